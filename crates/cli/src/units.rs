//! Sizes, rates and times, from words and to words.
//!
//! Sizes are 1024-based whatever way they are written, and a number without a unit is refused: one program takes it
//! for bytes, the next for MiB, and the mistake shows only later.

use std::time::{SystemTime, UNIX_EPOCH};

use berth_model::Timestamp;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const SIZE_EXPECTED: &str = "expected a size like 512MiB, 2GiB or 2G";
const BANDWIDTH_EXPECTED: &str = "expected a bandwidth like 800mbit, 1gbit or 100MiB/s";
const DURATION_EXPECTED: &str = "expected a duration like 90s, 5m, 24h or 7d";

/// Reads a size in bytes.
///
/// # Errors
/// What was expected instead.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split_number(text).ok_or(SIZE_EXPECTED)?;
    let unit_bytes = match unit.to_ascii_lowercase().as_str() {
        "b" => 1,
        "k" | "ki" | "kib" => KIB,
        "m" | "mi" | "mib" => MIB,
        "g" | "gi" | "gib" => GIB,
        "t" | "ti" | "tib" => TIB,
        "kb" | "mb" | "gb" | "tb" => {
            return Err(format!("'{unit}' may mean 1000 or 1024: {SIZE_EXPECTED}"));
        }
        "" => return Err(format!("a number without a unit: {SIZE_EXPECTED}")),
        _ => return Err(SIZE_EXPECTED.to_owned()),
    };
    scale(number, unit_bytes).ok_or_else(|| SIZE_EXPECTED.to_owned())
}

/// Reads a size that must be whole MiB, in MiB.
///
/// # Errors
/// What was expected instead.
pub fn parse_size_mib(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes.is_multiple_of(MIB) { Ok(bytes / MIB) } else { Err("expected a whole number of MiB".to_owned()) }
}

/// Reads a bandwidth, in bytes a second.
///
/// # Errors
/// What was expected instead.
pub fn parse_bandwidth(text: &str) -> Result<u64, String> {
    let wrong = || BANDWIDTH_EXPECTED.to_owned();
    if let Some(size) = text.strip_suffix("/s") {
        return parse_size(size).map_err(|_| wrong()).and_then(|bytes| nonzero(bytes).ok_or_else(wrong));
    }
    let (number, unit) = split_number(text).ok_or_else(wrong)?;
    // Links are rated in decimal bits.
    let unit_bits = match unit.to_ascii_lowercase().as_str() {
        "kbit" => 1_000,
        "mbit" => 1_000_000,
        "gbit" => 1_000_000_000,
        _ => return Err(wrong()),
    };
    scale(number, unit_bits).map(|bits| bits / 8).and_then(nonzero).ok_or_else(wrong)
}

/// Reads a duration, in seconds; a number alone is seconds.
///
/// # Errors
/// What was expected instead.
pub fn parse_duration_s(text: &str) -> Result<u64, String> {
    let wrong = || DURATION_EXPECTED.to_owned();
    let (number, unit) = split_number(text).ok_or_else(wrong)?;
    let unit_s = match unit {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    scale(number, unit_s).ok_or_else(wrong)
}

/// The same where seconds must fit 32 bits.
///
/// # Errors
/// What was expected instead.
pub fn parse_duration_s32(text: &str) -> Result<u32, String> {
    u32::try_from(parse_duration_s(text)?).map_err(|_| "expected at most 136 years".to_owned())
}

fn split_number(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (!number.is_empty()).then_some((number, unit.trim_start()))
}

/// `number` × `unit` without floating point; none for nonsense, for what is not whole, and for what is too large.
fn scale(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if number.contains('.') && (whole.is_empty() || fraction.is_empty() || fraction.len() > 12) {
        return None;
    }
    let mut value = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    if !fraction.is_empty() {
        let digits = fraction.parse::<u128>().ok()?.checked_mul(u128::from(unit))?;
        let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
        if !digits.is_multiple_of(scale) {
            return None;
        }
        value = value.checked_add(u64::try_from(digits / scale).ok()?)?;
    }
    Some(value)
}

fn nonzero(value: u64) -> Option<u64> {
    (value > 0).then_some(value)
}

/// What time it is on this machine.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Bytes for people: `812 MiB`, `2.0 GiB`.
pub fn bytes(value: u64) -> String {
    let (unit_bytes, unit) = match value {
        0..KIB => return format!("{value} B"),
        KIB..MIB => (KIB, "KiB"),
        MIB..GIB => (MIB, "MiB"),
        GIB..TIB => (GIB, "GiB"),
        TIB.. => (TIB, "TiB"),
    };
    let tenths = (u128::from(value) * 10 + u128::from(unit_bytes) / 2) / u128::from(unit_bytes);
    if tenths < 100 {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    } else {
        format!("{} {unit}", (tenths + 5) / 10)
    }
}

/// MiB for people.
pub fn mib(value: u64) -> String {
    bytes(value.saturating_mul(MIB))
}

/// How long ago something was, in its largest unit alone: `5s`, `12min`, `2h`, `3d`.
pub fn age(value_ms: u64) -> String {
    match value_ms / 1000 {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}min", seconds / 60),
        seconds @ 3600..86_400 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// A measured time for people, with three digits that mean something: `9 µs`, `12.3 ms`, `1.15 s`.
pub fn micros(value: u64) -> String {
    const MS: u64 = 1_000;
    const SECOND: u64 = 1_000_000;
    match value {
        0..MS => format!("{value} µs"),
        MS..10_000 => decimal(value, MS, 2, "ms"),
        10_000..100_000 => decimal(value, MS, 1, "ms"),
        100_000..SECOND => decimal(value, MS, 0, "ms"),
        SECOND..10_000_000 => decimal(value, SECOND, 2, "s"),
        10_000_000..60_000_000 => decimal(value, SECOND, 1, "s"),
        60_000_000.. => whole_seconds(value / SECOND),
    }
}

/// The same from milliseconds.
pub fn millis(value: u64) -> String {
    if value == 0 { "0 ms".to_owned() } else { micros(value.saturating_mul(1000)) }
}

/// Time that is left, which nobody needs in fractions.
pub fn left(value_ms: u64) -> String {
    whole_seconds(value_ms.div_ceil(1000))
}

fn whole_seconds(value: u64) -> String {
    match value {
        0..60 => format!("{value} s"),
        60..3600 => format!("{} min {:02} s", value / 60, value % 60),
        3600.. => format!("{} h {:02} min", value / 3600, value % 3600 / 60),
    }
}

fn decimal(value: u64, unit: u64, digits: u32, name: &str) -> String {
    let scale = 10u64.pow(digits);
    let scaled = (value * scale + unit / 2) / unit;
    if digits == 0 {
        format!("{scaled} {name}")
    } else {
        format!("{}.{:0width$} {name}", scaled / scale, scaled % scale, width = digits as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_refused() {
        for (text, expected) in [
            ("512MiB", 512 * MIB),
            ("2GiB", 2 * GIB),
            ("2G", 2 * GIB),
            ("1.5g", 3 * GIB / 2),
            ("64 KiB", 64 * KIB),
            ("0MiB", 0),
            ("7b", 7),
            ("1T", TIB),
        ] {
            assert_eq!(parse_size(text), Ok(expected), "{text}");
        }
        for text in
            ["", "512", "-1GiB", "GiB", "1..5G", ".5G", "5.G", "1e3M", "2GB", "1XiB", "99999999999T", "0.3B"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(parse_size_mib("1GiB"), Ok(1024));
        assert!(parse_size_mib("1KiB").is_err());
    }

    #[test]
    fn bandwidths_and_durations_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_bandwidth("800mbit"), Ok(100_000_000));
        assert_eq!(parse_bandwidth("1gbit"), Ok(125_000_000));
        assert_eq!(parse_bandwidth("2.5Gbit"), Ok(312_500_000));
        assert_eq!(parse_bandwidth("100MiB/s"), Ok(100 * MIB));
        for text in ["", "800", "0mbit", "0MiB/s", "800mb", "-1gbit", "1gbit/s", "fast"] {
            assert!(parse_bandwidth(text).is_err(), "{text}");
        }
        for (text, expected) in [("90s", 90), ("90", 90), ("5m", 300), ("24h", 86_400), ("7d", 604_800)] {
            assert_eq!(parse_duration_s(text), Ok(expected), "{text}");
        }
        for text in ["", "-1s", "1w", "soon", "1h30m"] {
            assert!(parse_duration_s(text).is_err(), "{text}");
        }
        assert!(parse_duration_s32("99999d").is_err());
    }

    #[test]
    fn sizes_read_well() {
        for (value, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (812 * MIB, "812 MiB"),
            (2 * GIB, "2.0 GiB"),
            (10 * GIB - 1, "10 GiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(bytes(value), expected);
        }
    }

    #[test]
    fn times_read_well() {
        for (value, expected) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (7_534, "7.53 ms"),
            (12_345, "12.3 ms"),
            (139_400, "139 ms"),
            (1_154_000, "1.15 s"),
            (24_040_000, "24.0 s"),
            (125_000_000, "2 min 05 s"),
        ] {
            assert_eq!(micros(value), expected);
        }
        assert_eq!(left(3_001), "4 s");
        assert_eq!(left(3_700_000), "1 h 01 min");
    }
}
