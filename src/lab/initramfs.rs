//! Initial RAM file systems: the kernel's "newc" cpio format (Documentation/driver-api/early-userspace/
//! buffer-format.rst), written uncompressed.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{LabError, Result, Trying, run};

/// File type bits of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written.
#[derive(Debug)]
pub struct Archive<W: Write> {
    out: W,
    inode: u32,
    made: HashSet<String>,
}

impl<W: Write> Archive<W> {
    /// Starts an archive with the console node that the kernel opens for its first process.
    ///
    /// # Errors
    /// Writing failed.
    pub fn new(out: W) -> Result<Self> {
        let mut archive = Self { out, inode: 0, made: HashSet::new() };
        archive.node("/dev/console", 0o600, 5, 1)?;
        Ok(archive)
    }

    /// Adds a directory and those above it.
    ///
    /// # Errors
    /// Writing failed.
    pub fn dir(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        let ends = path.match_indices('/').map(|(at, _)| at);
        for end in ends.chain([path.len()]).filter(|end| *end > 0) {
            if self.made.insert(path[..end].to_owned()) {
                self.entry(&path[..end], DIRECTORY | 0o755, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    /// Adds a file; a second one of the same path is ignored.
    ///
    /// # Errors
    /// Writing failed.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.leaf(path, REGULAR | mode, (0, 0), data)
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// Writing failed.
    pub fn node(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        self.leaf(path, CHARACTER | mode, (major, minor), &[])
    }

    /// Adds a program of this machine and the shared libraries it needs, without debug information.
    ///
    /// # Errors
    /// It or one of its libraries cannot be read, or writing failed.
    pub fn program(&mut self, guest_path: &str, program: &Path) -> Result<()> {
        self.file(guest_path, 0o755, &stripped(program)?)?;
        for library in libraries(program)? {
            let data = fs::read(&library).trying(|| format!("cannot read {}", library.display()))?;
            self.file(&library.to_string_lossy(), 0o755, &data)?;
        }
        Ok(())
    }

    /// Ends the archive and gives back what it was written to.
    ///
    /// # Errors
    /// Writing failed.
    pub fn finish(mut self) -> Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush().trying(|| "cannot write the initial RAM file system")?;
        Ok(self.out)
    }

    fn leaf(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        let path = path.trim_start_matches('/');
        if let Some((dir, _)) = path.rsplit_once('/') {
            self.dir(dir)?;
        }
        if self.made.insert(path.to_owned()) {
            self.entry(path, mode, device, data)?;
        }
        Ok(())
    }

    /// One record: thirteen hexadecimal fields, the name with its NUL, the data; both padded to four
    /// bytes, the name together with the 110 bytes of header.
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        let too_long = |_| LabError::Failed(format!("{name}: too large for an initramfs"));
        let len_bytes = u32::try_from(data.len()).map_err(too_long)?;
        let name_bytes = u32::try_from(name.len() + 1).map_err(too_long)?;
        self.inode += 1;
        let (major, minor) = device;
        let fields = [self.inode, mode, 0, 0, 1, 0, len_bytes, 0, 0, major, minor, name_bytes, 0];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08X}"));
        }
        head.push_str(name);
        head.push('\0');
        while head.len() % 4 != 0 {
            head.push('\0');
        }
        let padding = &[0_u8; 3][..data.len().next_multiple_of(4) - data.len()];
        for part in [head.as_bytes(), data, padding] {
            self.out.write_all(part).trying(|| "cannot write the initial RAM file system")?;
        }
        Ok(())
    }
}

/// A program's bytes without debug information, which can be nine tenths of it.
pub(super) fn stripped(program: &Path) -> Result<Vec<u8>> {
    static COPIES: AtomicU32 = AtomicU32::new(0);
    let number = COPIES.fetch_add(1, Ordering::Relaxed);
    let copy = std::env::temp_dir().join(format!("infill-strip-{}-{number}", std::process::id()));
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("-o").arg(&copy).arg(program);
    // What strip cannot handle (a script, say) is taken as it is.
    let from: &Path = if run(&mut strip).is_ok() { &copy } else { program };
    let data = fs::read(from).trying(|| format!("cannot read {}", program.display()));
    let _ = fs::remove_file(&copy);
    data
}

/// The shared libraries of a program, the loader among them; none for a static one.
///
/// # Errors
/// The machine's `ldd` cannot be run, or a library is not there.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().trying(|| "cannot run ldd (package libc-bin)")?;
    // ldd fails for static programs and for scripts: those need nothing.
    if !output.status.success() {
        return Ok(Vec::new());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        return Err(LabError::Failed(format!("{} needs a library that is not there: {}", program.display(), line.trim())));
    }
    Ok(paths_in_ldd(&text))
}

/// Lines are `name => /path (0x...)`, `/path/of/loader (0x...)`, or `linux-vdso.so.1 (0x...)`.
fn paths_in_ldd(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let line = line.split_once("=> ").map_or(line, |(_, path)| path).trim();
            let (path, _) = line.rsplit_once(" (0x")?;
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_layout_the_kernel_reads() {
        let mut archive = Archive::new(Vec::new()).expect("a vector takes everything");
        archive.file("/a/b", 0o755, b"hello").expect("write");
        archive.file("/a/b", 0o755, b"again").expect("ignored");
        let bytes = archive.finish().expect("write");
        let mut names = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let field = |n: usize| {
                let start = at + 6 + n * 8;
                let text = std::str::from_utf8(&bytes[start..start + 8]).expect("ASCII");
                usize::from_str_radix(text, 16).expect("hexadecimal")
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (size, name_len) = (field(6), field(11));
            let name = &bytes[at + 110..at + 110 + name_len - 1];
            let data = (at + 110 + name_len).next_multiple_of(4);
            names.push((name.to_vec(), bytes[data..data + size].to_vec()));
            at = (data + size).next_multiple_of(4);
        }
        let expected: Vec<(Vec<u8>, Vec<u8>)> =
            [("dev", ""), ("dev/console", ""), ("a", ""), ("a/b", "hello"), ("TRAILER!!!", "")].map(|(n, d)| (n.into(), d.into())).into();
        assert_eq!(names, expected);
    }

    #[test]
    fn libraries_are_found_in_every_form_ldd_prints() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(paths_in_ldd(text), expected);
    }
}
