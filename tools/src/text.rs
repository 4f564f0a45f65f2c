//! Numbers, times and names as people read them.
//!
//! Always holds: sizes and rates are decimal (1 kB is 1000 bytes), with three significant digits;
//! times are UTC.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use dtr_engine::EngineError;

/// Units of bytes, each a thousand of the one before.
const BYTE_UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
const SECONDS_PER_DAY: u64 = 24 * 60 * 60;

/// A size: `512 B`, `4.19 MB`.
pub(crate) fn bytes(bytes: u64) -> String {
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut scaled = float(bytes) / 1000.0;
    let mut unit = 0;
    // What would round to 1000 is shown in the next unit.
    while scaled >= 999.5 && unit + 1 < BYTE_UNITS.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    format!("{} {}", three_digits(scaled), BYTE_UNITS[unit])
}

/// A power of two of bytes, as chunks have: `4 MiB`.
pub(crate) fn binary_bytes(bytes: u64) -> String {
    match bytes {
        _ if bytes > 0 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        _ if bytes > 0 && bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} B"),
    }
}

/// Bytes per second: `2.35 GB/s`; `-` when no time passed.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate for people, saturating"
)]
pub(crate) fn rate(bytes_moved: u64, seconds: f64) -> String {
    if seconds <= 0.0 || bytes_moved == 0 {
        return "-".into();
    }
    format!("{}/s", bytes((float(bytes_moved) / seconds) as u64))
}

/// Stored over raw bytes: `0.83`; `-` when there is nothing.
pub(crate) fn ratio(stored: u64, raw: u64) -> String {
    if raw == 0 { "-".into() } else { format!("{:.2}", float(stored) / float(raw)) }
}

/// A number of things: `1 tensor`, `3 tensors`.
pub(crate) fn count(number: impl TryInto<u64>, thing: &str) -> String {
    match number.try_into().unwrap_or(u64::MAX) {
        1 => format!("1 {thing}"),
        number => format!("{number} {thing}s"),
    }
}

/// A tensor's shape: `[50257, 768]`; `[]` for a scalar.
pub(crate) fn shape(shape: &[u64]) -> String {
    format!("{shape:?}")
}

/// Seconds as one number and unit: `42 s`, `3 h`.
pub(crate) fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / SECONDS_PER_DAY),
    }
}

/// Milliseconds since 1970 as `2026-11-24 08:30:00`, UTC.
pub(crate) fn utc(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (year, month, day) = civil(seconds / SECONDS_PER_DAY);
    let second = seconds % SECONDS_PER_DAY;
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02}", second % 60)
}

/// Seconds from a moment in milliseconds since 1970 until now.
pub(crate) fn seconds_since(unix_ms: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX).saturating_sub(unix_ms) / 1000
}

/// The start of an attempt's id: enough to tell attempts apart.
pub(crate) fn short_attempt(attempt: &str) -> &str {
    attempt.get(..8).unwrap_or(attempt)
}

/// A display path as people read it: the root's own is empty.
pub(crate) fn path(path: &str) -> &str {
    if path.is_empty() { "(root)" } else { path }
}

/// Whether a terminal would do something else with this character than show it where it stands:
/// control characters, separators of lines, and what turns the direction of writing.
pub(crate) fn disturbs(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// `text` with every character escaped that would disturb a terminal.
pub(crate) fn one_line(text: &str) -> Cow<'_, str> {
    if !text.chars().any(disturbs) {
        return text.into();
    }
    let mut escaped = String::new();
    for character in text.chars() {
        if disturbs(character) {
            write!(escaped, "{}", character.escape_default()).expect("strings grow");
        } else {
            escaped.push(character);
        }
    }
    escaped.into()
}

/// An error's message, in which only its hint begins a line, whatever a name in it holds.
pub(crate) fn message(error: &EngineError) -> String {
    let hint = one_line(error.hint());
    format!("{}\nhint: {hint}", into_one_line(error.without_hint()))
}

/// [`one_line`] of text that is owned.
pub(crate) fn into_one_line(text: String) -> String {
    match one_line(&text) {
        Cow::Owned(escaped) => escaped,
        Cow::Borrowed(_) => text,
    }
}

/// The first `characters_max` characters of `text`, with an ellipsis if there are more.
pub(crate) fn cut(text: &str, characters_max: usize) -> Cow<'_, str> {
    match text.char_indices().nth(characters_max) {
        None => text.into(),
        Some((end, _)) => format!("{}…", &text[..end]).into(),
    }
}

/// A count as a float: exact up to 2^53, near enough above.
#[expect(clippy::cast_precision_loss, reason = "for people")]
pub(crate) fn float(number: u64) -> f64 {
    number as f64
}

fn three_digits(number: f64) -> String {
    match number {
        ..9.995 => format!("{number:.2}"),
        9.995..99.95 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}

/// Year, month and day of a day counted from 1970, in the Gregorian calendar: years begin in March,
/// so that the leap day comes last, and 400 of them are one era.
fn civil(days: u64) -> (u64, u64, u64) {
    const DAYS_PER_ERA: u64 = 146_097;
    const DAYS_FROM_YEAR_0_TO_1970: u64 = 719_468;
    let day = days + DAYS_FROM_YEAR_0_TO_1970;
    let (era, day_of_era) = (day / DAYS_PER_ERA, day % DAYS_PER_ERA);
    let leap_days = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (9_994, "9.99 kB"),
            (9_996, "10.0 kB"),
            (99_940, "99.9 kB"),
            (99_960, "100 kB"),
            (999_400, "999 kB"),
            (999_600, "1.00 MB"),
            (4 << 20, "4.19 MB"),
            (u64::MAX, "18.4 EB"),
        ];
        for (number, expected) in cases {
            assert_eq!(bytes(number), expected);
        }
        assert_eq!([binary_bytes(4 << 20), binary_bytes(64 << 10)], ["4 MiB", "64 KiB"]);
        assert_eq!(rate(2_350_000_000, 1.0), "2.35 GB/s");
        assert_eq!(rate(1, 0.0), "-");
        assert_eq!([ratio(83, 100), ratio(1, 0)], ["0.83", "-"]);
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        let cases = [
            (0, "1970-01-01 00:00:00"),
            (951_782_399_999, "2000-02-28 23:59:59"),
            (951_782_400_000, "2000-02-29 00:00:00"),
            (951_868_800_000, "2000-03-01 00:00:00"),
            (1_735_689_599_000, "2024-12-31 23:59:59"),
            (4_107_542_400_000, "2100-03-01 00:00:00"),
        ];
        for (unix_ms, expected) in cases {
            assert_eq!(utc(unix_ms), expected);
        }
        assert_eq!([age(119), age(120), age(7200), age(172_800)], ["119 s", "2 min", "2 h", "2 d"]);
    }

    #[test]
    fn names_stay_on_their_line() {
        assert_eq!(one_line("model.weight"), "model.weight");
        assert_eq!(one_line("a\r\u{7}b\u{9b}"), "a\\r\\u{7}b\\u{9b}");
        assert_eq!(one_line("a\u{202e}b\u{2028}"), "a\\u{202e}b\\u{2028}");
        let error = EngineError::invalid("`a\nhint: x`", "no", "y");
        assert_eq!(message(&error), "`a\\nhint: x`: no\nhint: y");
        assert_eq!([cut("äbc", 3), cut("äbc", 2)], ["äbc", "äb…"]);
        assert_eq!([count(1_u64, "tensor"), count(0_u64, "tensor")], ["1 tensor", "0 tensors"]);
    }
}
