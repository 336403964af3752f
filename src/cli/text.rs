//! Text for people: sizes, times, modes, and names that a terminal must not obey.

use crate::image::answers::FileInfo;

/// The text with control characters shown as `?`: names in an image and words of a registry are foreign, and a terminal
/// would obey them.
pub(super) fn visible(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\n' { '?' } else { c })
        .collect()
}

/// One name on one line.
pub(super) fn visible_name(name: &str) -> String {
    visible(name).replace('\n', "?")
}

/// A size for people, such as `1.5 MiB`.
pub(super) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut whole, mut rest, mut unit) = (bytes, 0, 0);
    while whole >= 1024 && unit + 1 < UNITS.len() {
        rest = whole % 1024;
        whole /= 1024;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    match unit {
        0 => format!("{whole} {name}"),
        _ => format!("{whole}.{} {name}", rest * 10 / 1024),
    }
}

/// `YYYY-MM-DD HH:MM` in UTC of seconds since 1970.
pub(super) fn date(seconds: i64) -> String {
    let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (hour, minute) = (second_of_day / 3600, second_of_day % 3600 / 60);
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}")
}

/// `YYYY-MM-DDTHH:MM:SS.mmmZ` (RFC 3339) of milliseconds since 1970.
pub(super) fn timestamp(ms: u64) -> String {
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    // Milliseconds in 64 bits are fewer days than 63 bits hold.
    let (year, month, day) = civil(days.cast_signed());
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// A time span for people, never rounded up: `40 ms`, `59 s`, `2 min`, `3 h 20 min`, `5 d 4 h`.
pub(super) fn human_duration(ms: u64) -> String {
    let seconds = ms / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes, seconds) {
        (0, 0, 0, 0) if ms > 0 => format!("{ms} ms"),
        (0, 0, 0, _) => format!("{seconds} s"),
        (0, 0, _, _) => format!("{minutes} min"),
        (0, _, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// The Gregorian date of a number of days since 1970-01-01. Counted in cycles of 400 years, the time after which the
/// calendar repeats, and in years that begin in March, so that the leap day comes last.
fn civil(days: i64) -> (i64, i64, i64) {
    const DAYS_BEFORE_1970: i64 = 719_468; // from 0000-03-01
    const CYCLE: i64 = 146_097;
    let shifted = days.saturating_add(DAYS_BEFORE_1970);
    let (cycle, day_of_cycle) = (shifted.div_euclid(CYCLE), shifted.rem_euclid(CYCLE));
    let leap_days = day_of_cycle / 1460 - day_of_cycle / 36_524 + day_of_cycle / (CYCLE - 1);
    let year_of_cycle = (day_of_cycle - leap_days) / 365;
    let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    // From March on, months have 31, 30, 31, 30, 31 days, again and again: 153 days in five months.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (cycle * 400 + year_of_cycle + i64::from(month <= 2), month, day)
}

/// Type and permissions as `ls -l` shows them.
pub(super) fn mode_text(kind: &str, mode: u32) -> String {
    let kind = match kind {
        "dir" => 'd',
        "symlink" => 'l',
        "char" => 'c',
        "block" => 'b',
        "fifo" => 'p',
        _ => '-',
    };
    let triple = |shift: u32, special: bool, letter: char| {
        let bit = |bit: u32, letter: char| if mode >> shift & bit != 0 { letter } else { '-' };
        let execute = match (mode >> shift & 1 != 0, special) {
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
            (true, false) => 'x',
            (false, false) => '-',
        };
        [bit(4, 'r'), bit(2, 'w'), execute]
    };
    let owner = triple(6, mode & 0o4000 != 0, 's');
    let group = triple(3, mode & 0o2000 != 0, 's');
    let others = triple(0, mode & 0o1000 != 0, 't');
    std::iter::once(kind)
        .chain(owner)
        .chain(group)
        .chain(others)
        .collect()
}

/// The size column: a device has its numbers there.
pub(super) fn size_text(file: &FileInfo) -> String {
    match file.rdev {
        Some((major, minor)) => format!("{major}, {minor}"),
        None => file.size.to_string(),
    }
}

/// The name, and for a symbolic link its target.
pub(super) fn name_text(file: &FileInfo) -> String {
    match &file.target {
        Some(target) => format!("{} -> {}", visible_name(&file.name), visible_name(target)),
        None => visible_name(&file.name),
    }
}

/// Lines of a table whose columns are as wide as their widest cell; those in `right` are set to the right.
pub(super) fn table(rows: &[Vec<String>], right: &[usize]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    rows.iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).enumerate();
            let cells = cells.map(|(column, (cell, &width))| {
                if right.contains(&column) {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00"),
            (951_827_696, "2000-02-29 12:34"),
            (-1, "1969-12-31 23:59"),
            (4_107_542_399, "2100-02-28 23:59"),
            (4_107_542_400, "2100-03-01 00:00"),
            (1_735_689_599, "2024-12-31 23:59"),
        ] {
            assert_eq!(date(seconds), text);
        }
        // Any number of seconds that a layer may hold has some date.
        assert!(!date(i64::MAX).is_empty() && !date(i64::MIN).is_empty());
    }

    #[test]
    fn moments_and_spans_are_for_people() {
        assert_eq!(timestamp(951_827_696_007), "2000-02-29T12:34:56.007Z");
        assert!(timestamp(u64::MAX).ends_with('Z'));
        for (ms, text) in [
            (0, "0 s"),
            (999, "999 ms"),
            (59_999, "59 s"),
            (150_000, "2 min"),
            (12_000_000, "3 h 20 min"),
            (446_400_000, "5 d 4 h"),
        ] {
            assert_eq!(human_duration(ms), text);
        }
    }

    #[test]
    fn modes_read_as_in_ls() {
        for (kind, mode, text) in [
            ("dir", 0o1777, "drwxrwxrwt"),
            ("file", 0o4755, "-rwsr-xr-x"),
            ("file", 0o2644, "-rw-r-Sr--"),
            ("symlink", 0o777, "lrwxrwxrwx"),
            ("char", 0o600, "crw-------"),
            ("file", 0o1000, "---------T"),
        ] {
            assert_eq!(mode_text(kind, mode), text);
        }
    }

    #[test]
    fn foreign_names_cannot_steer_the_terminal() {
        assert_eq!(visible_name("a\u{1b}[31mb\nc\u{9b}"), "a?[31mb?c?");
    }

    #[test]
    fn sizes_have_one_decimal_and_are_never_rounded_up() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1023.9 KiB"),
            (u64::MAX, "16383.9 PiB"),
        ] {
            assert_eq!(human_bytes(bytes), text);
        }
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["a".into(), "10".into(), "x".into()],
            vec!["bbb".into(), "9".into(), "".into()],
        ];
        assert_eq!(table(&rows, &[1]), ["a    10  x", "bbb   9"]);
    }
}
