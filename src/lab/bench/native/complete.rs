//! What infill leaves behind when a blob is complete: reads of its file, and of an image that is mounted from it, beside the same
//! of a file that was never watched.

use std::path::Path;

use super::ground::{Ground, Infill, Mounted, ONE, ONE_BYTES, ONE_FILE, image_in, prime};
use super::load::{PAGE_BYTES, Seen, Until, read_randomly};
use super::samples::{Figures, Samples};
use super::{Plan, Section, Subject};
use crate::lab::Result;
use crate::lab::progress::Progress;

/// Pages of the file.
const PAGES: u64 = ONE_BYTES / PAGE_BYTES;

/// Measures.
pub(super) fn measure(plan: &Plan, ground: &Ground) -> Result<Section> {
    let mut progress = Progress::begin("complete: reading what is not watched any more");
    let never = ground.copy_of_blob("complete-never")?;
    let mut infill = Infill::start(plan, &[&ground.store()], &ground.dir("complete")?, &[])?;
    let (_, complete) = infill.attach(ONE)?;
    prime(&complete, &ground.blob(), PAGES)?;
    let at = ground.path("complete-mnt");
    let image = image_in(&ground.store(), ONE);
    let before_ns = infill.cpu_ns()?;
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        progress.update(|| format!("round {}", round + 1));
        let direct = |file: &Path| read_randomly(file, PAGES, 1, Until::Over(plan.time));
        // Each page of a mount is cold once, and the blob's own are in the page cache.
        let mounted = |file: &Path| -> Result<Seen> {
            let mounted = Mounted::make(&image, file, &at)?;
            let seen = read_randomly(&mounted.at().join(ONE_FILE), PAGES, 1, Until::AllRead)?;
            mounted.end()?;
            Ok(seen)
        };
        // Who comes first has the colder caches: in turn.
        let files = if round % 2 == 0 { [&never, &complete] } else { [&complete, &never] };
        for (suffix, read) in [("", &direct as &dyn Fn(&Path) -> Result<Seen>), (", EROFS", &mounted)] {
            let [first, second] = [read(files[0])?, read(files[1])?];
            let (never, complete) = if round % 2 == 0 { (first, second) } else { (second, first) };
            samples.add(&format!("never watched{suffix}"), 1, figures(&never, &never));
            samples.add(&format!("complete{suffix}"), 1, figures(&complete, &never));
        }
    }
    let daemon_cpu_ms = (infill.cpu_ns()? - before_ns) as f64 / 1e6;
    infill.end()?;
    progress.finish("done");
    let title = format!(
        "random reads of 4 KiB, of a blob's file in the page cache and cold through EROFS; infill used {daemon_cpu_ms:.1} ms of CPU time in all of it"
    );
    Ok(samples.section(Subject::Complete, title, &["p50_us", "p50_of_never", "p99_us", "reader_cpu_us", "cpu_of_never", "reads_per_s"]))
}

fn figures(seen: &Seen, never: &Seen) -> Figures {
    vec![
        ("p50_us", seen.p50_us),
        ("p99_us", seen.p99_us),
        ("reader_cpu_us", seen.cpu_us),
        ("reads_per_s", seen.reads_per_s),
        ("p50_of_never", seen.p50_us / never.p50_us),
        ("cpu_of_never", seen.cpu_us / never.cpu_us),
    ]
}
