//! Numbers and names as people read them.

/// A number of bytes, for people.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut tenths = u128::from(bytes) * 10;
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    for unit in UNITS {
        tenths /= 1024;
        if tenths < 10_240 {
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    format!("{} EiB", tenths / 10_240)
}

/// A number of microseconds, for people.
pub(super) fn time(us: f64) -> String {
    match us {
        us if us < 1000.0 => format!("{us:.0} us"),
        us if us < 10_000.0 => format!("{:.1} ms", us / 1e3),
        us if us < 1e6 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

/// The end of a text: what tells names apart is there as a rule.
pub(super) fn cut(text: &str, columns: usize) -> String {
    let len = text.chars().count();
    if len <= columns { text.to_owned() } else { format!("...{}", text.chars().skip(len - columns + 3).collect::<String>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        let texts: Vec<_> = [0, 1023, 1024, 1536, 1 << 20, u64::MAX].map(size).into();
        assert_eq!(texts, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "15 EiB"]);
        assert_eq!([3.4, 1500.0, 34_000.0, 2_500_000.0].map(time), ["3 us", "1.5 ms", "34 ms", "2.5 s"]);
    }
}
