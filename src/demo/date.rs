//! Dates as HTTP, signed URLs and token answers spell them.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::layer::time::{format_rfc3339, parse_rfc3339};

/// Seconds since 1970 now.
pub(super) fn now_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// `1994-11-06T08:49:37Z` (RFC 3339). Times after the year 9999 are written as 1970.
pub(super) fn rfc3339(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(format_rfc3339)
        .unwrap_or_else(|| "1970-01-01T00:00:00Z".to_owned())
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110 section 5.6.7).
pub(super) fn http(seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let text = rfc3339(seconds);
    let part = |from: usize, to: usize| text.get(from..to).unwrap_or_default();
    let month = part(5, 7).parse::<usize>().unwrap_or(1);
    let month = MONTHS.get(month.wrapping_sub(1)).copied().unwrap_or_default();
    let weekday = DAYS[(seconds / 86_400 % 7) as usize];
    format!(
        "{weekday}, {} {month} {} {} GMT",
        part(8, 10),
        part(0, 4),
        part(11, 19)
    )
}

/// `19941106T084937Z`, as in `X-Amz-Date`.
pub(super) fn basic(seconds: u64) -> String {
    rfc3339(seconds).replace(['-', ':'], "")
}

/// The inverse of [`basic`]; `None` for anything that it does not write.
pub(super) fn parse_basic(text: &str) -> Option<u64> {
    let part = |from: usize, to: usize| text.get(from..to);
    let (date, clock) = (
        (part(0, 4)?, part(4, 6)?, part(6, 8)?),
        (part(9, 11)?, part(11, 13)?, part(13, 15)?),
    );
    let spelled = format!(
        "{}-{}-{}T{}:{}:{}Z",
        date.0, date.1, date.2, clock.0, clock.1, clock.2
    );
    let seconds = u64::try_from(parse_rfc3339(&spelled)?.seconds).ok()?;
    (basic(seconds) == text).then_some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_agree_with_date_1() {
        assert_eq!(http(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(basic(784_111_777), "19941106T084937Z");
        assert_eq!(http(951_782_400), "Tue, 29 Feb 2000 00:00:00 GMT");
    }

    #[test]
    fn the_date_of_a_signed_url_is_read_back() {
        for seconds in [0, 784_111_777, 951_782_400] {
            assert_eq!(parse_basic(&basic(seconds)), Some(seconds));
        }
        for text in ["", "19700230T000000Z", "1970-01-01", "00000101T000000Z"] {
            assert_eq!(parse_basic(text), None, "{text}");
        }
    }
}
