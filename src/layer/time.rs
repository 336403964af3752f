//! Times as text: RFC 3339, as the tables of contents of eStargz and zstd:chunked write them.
//!
//! Dates are those of the proleptic Gregorian calendar, counted in days from 1970 by Euclidean division, so times before
//! 1970 need no cases of their own.

use crate::layer::entry::Time;

/// Days from 0000-03-01 to 1970-01-01.
const EPOCH_DAYS: i64 = 719_468;
/// Days in 400 years.
const ERA_DAYS: i64 = 146_097;
const DAY_SECONDS: i64 = 86_400;

/// Parses `YYYY-MM-DDThh:mm:ss[.fraction](Z|±hh:mm)`. Digits of the fraction beyond nanoseconds are dropped. `None` for
/// anything else, leap seconds included, as in Go.
#[must_use]
pub fn parse_rfc3339(text: &str) -> Option<Time> {
    let bytes = text.as_bytes();
    let (head, mut rest) = bytes.split_at_checked(19)?;
    for (at, separator) in [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')] {
        if head.get(at) != Some(&separator) {
            return None;
        }
    }
    let (year, month, day) = (number(&head[..4])?, number(&head[5..7])?, number(&head[8..10])?);
    let (hour, minute, second) = (
        number(&head[11..13])?,
        number(&head[14..16])?,
        number(&head[17..])?,
    );
    if !(1..=12).contains(&month) || !(1..=month_days(year, month)).contains(&day) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let mut nanos = 0;
    if let Some(fraction) = rest.strip_prefix(b".") {
        let len = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if len == 0 {
            return None;
        }
        let digits = fraction[..len].iter().chain(std::iter::repeat(&b'0')).take(9);
        nanos = digits.fold(0, |n, digit| n * 10 + u32::from(digit - b'0'));
        rest = &fraction[len..];
    }
    let offset_seconds = match *rest {
        [b'Z'] => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (number(&[h1, h2])?, number(&[m1, m2])?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let seconds = hours * 3600 + minutes * 60;
            if sign == b'-' { -seconds } else { seconds }
        }
        _ => return None,
    };
    let seconds = days_from_date(year, month, day) * DAY_SECONDS + hour * 3600 + minute * 60 + second;
    Some(Time {
        seconds: seconds - offset_seconds,
        nanos,
    })
}

/// Formats whole seconds since 1970 as `YYYY-MM-DDThh:mm:ssZ`; `None` outside of the years 0 to 9999, which RFC 3339
/// cannot say.
#[must_use]
pub fn format_rfc3339(seconds: i64) -> Option<String> {
    let (days, second) = (seconds.div_euclid(DAY_SECONDS), seconds.rem_euclid(DAY_SECONDS));
    let (year, month, day) = date_from_days(days)?;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    (0..=9999)
        .contains(&year)
        .then(|| format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"))
}

fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0, |n, digit| {
        digit.is_ascii_digit().then(|| n * 10 + i64::from(digit - b'0'))
    })
}

fn month_days(year: i64, month: i64) -> i64 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970. Years are counted from March, so that the leap day is a year's last day and the months before a day
/// have lengths in a pattern of five (153 days).
fn days_from_date(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * ERA_DAYS + day_of_era - EPOCH_DAYS
}

/// The inverse of [`days_from_date`]: year, month, day.
fn date_from_days(days: i64) -> Option<(i64, i64, i64)> {
    let days = days.checked_add(EPOCH_DAYS)?;
    let era = days.div_euclid(ERA_DAYS);
    let day_of_era = days.rem_euclid(ERA_DAYS);
    let leap_days = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    Some((year, month, day))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: i64, nanos: u32) -> Option<Time> {
        Some(Time { seconds, nanos })
    }

    #[test]
    fn known_times_are_read() {
        // The seconds are what `date -u -d TEXT +%s` prints.
        let cases = [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2024-02-29T12:34:56Z", 1_709_210_096, 0),
            ("2000-03-01T00:00:00Z", 951_868_800, 0),
            ("1969-12-31T23:59:59.5Z", -1, 500_000_000),
            ("0001-01-01T00:00:00Z", -62_135_596_800, 0),
            ("9999-12-31T23:59:59Z", 253_402_300_799, 0),
            (
                "2020-01-01T01:00:00.123456789999+01:00",
                1_577_836_800,
                123_456_789,
            ),
            ("2019-12-31T19:30:00-04:30", 1_577_836_800, 0),
        ];
        for (text, seconds, nanos) in cases {
            assert_eq!(parse_rfc3339(text), at(seconds, nanos), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let cases = [
            "",
            "2020-01-01",
            "2020-01-01T00:00:00",
            "2020-01-01 00:00:00Z",
            "2020-13-01T00:00:00Z",
            "2020-00-01T00:00:00Z",
            "2021-02-29T00:00:00Z",
            "2020-04-31T00:00:00Z",
            "2020-01-01T24:00:00Z",
            "2020-01-01T00:00:60Z",
            "2020-01-01T00:00:00.Z",
            "2020-01-01T00:00:00+1:00",
            "2020-01-01T00:00:00+24:00",
            "2020-01-01T00:00:00ZZ",
            "-020-01-01T00:00:00Z",
            "2020-01-01T00:00:0\u{660}Z",
        ];
        for text in cases {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
        assert_eq!(format_rfc3339(253_402_300_800), None);
        assert_eq!(format_rfc3339(i64::MIN).or(format_rfc3339(i64::MAX)), None);
    }

    proptest! {
        #[test]
        fn formatting_and_parsing_are_inverse(seconds in -62_167_219_200_i64..253_402_300_800) {
            let text = format_rfc3339(seconds).unwrap();
            prop_assert_eq!(parse_rfc3339(&text), at(seconds, 0));
        }

        #[test]
        fn no_text_panics(text in "[0-9TZ:+.-]{0,40}") {
            let _ = parse_rfc3339(&text);
        }
    }
}
