//! Numbers as people read them.

/// A count with thin spaces between thousands.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// A count that may be unknown.
pub fn maybe(number: Option<u64>) -> String {
    number.map_or_else(|| "–".to_owned(), count)
}

/// Bytes, in decimal units.
pub fn bytes(number: u64) -> String {
    let number = number as f64;
    match number {
        0.0 => "0".to_owned(),
        ..1e4 => format!("{number:.0} B"),
        ..1e6 => format!("{:.1} kB", number / 1e3),
        ..1e9 => format!("{} MB", three(number / 1e6)),
        ..1e12 => format!("{} GB", three(number / 1e9)),
        _ => format!("{} TB", three(number / 1e12)),
    }
}

/// Guest memory: pages of 4 KiB in binary units.
pub fn memory(pages: u64) -> String {
    let kib = pages as f64 * 4.0;
    match kib {
        0.0 => "0".to_owned(),
        ..1024.0 => format!("{kib:.0} KiB"),
        ..1_048_576.0 => format!("{} MiB", three(kib / 1024.0)),
        ..1_073_741_824.0 => format!("{} GiB", three(kib / 1_048_576.0)),
        _ => format!("{} TiB", three(kib / 1_073_741_824.0)),
    }
}

/// A time.
pub fn seconds(number: f64) -> String {
    match number {
        ..1.0 => format!("{:.0} ms", number * 1e3),
        ..100.0 => format!("{} s", three(number)),
        ..7200.0 => format!("{:.0} min {:02.0} s", (number / 60.0).floor(), (number % 60.0).floor()),
        _ => format!("{:.1} h", number / 3600.0),
    }
}

/// Three digits that matter.
fn three(number: f64) -> String {
    match number {
        ..10.0 => format!("{number:.2}"),
        ..100.0 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}

/// A part of a whole, in percent.
pub fn share(part: f64, whole: f64) -> String {
    if whole <= 0.0 {
        return "–".to_owned();
    }
    match part / whole * 100.0 {
        percent if percent > 0.0 && percent < 0.1 => "< 0.1 %".to_owned(),
        percent if percent < 10.0 => format!("{percent:.1} %"),
        percent => format!("{percent:.0} %"),
    }
}

/// A coordinate: more digits than these are not seen.
pub fn at(number: f64) -> String {
    let text = format!("{number:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_have_units() {
        assert_eq!(count(1_234_567).replace('\u{202f}', " "), "1 234 567");
        assert_eq!((count(0), count(999), maybe(None)), ("0".into(), "999".into(), "–".into()));
        assert_eq!(bytes(82_512_345), "82.5 MB");
        assert_eq!((bytes(9_999), bytes(u64::MAX)), ("9999 B".into(), "18446744 TB".into()));
        assert_eq!((memory(163_840), memory(3)), ("640 MiB".into(), "12 KiB".into()));
        assert_eq!(
            (seconds(0.31), seconds(12.345), seconds(125.0)),
            ("310 ms".into(), "12.3 s".into(), "2 min 05 s".into())
        );
        assert_eq!(
            (share(1.0, 4.0), share(0.0, 0.0), share(1.0, 1e6)),
            ("25 %".into(), "–".into(), "< 0.1 %".into())
        );
        assert_eq!((at(1.0), at(2.5), at(0.126)), ("1".into(), "2.5".into(), "0.13".into()));
    }
}
