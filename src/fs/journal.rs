//! The last failed operations and why: `.registryfs/errors`, and part of `status`.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::Serialize;

use crate::error::Error;

/// One failed operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// What was asked: `lookup`, `readdir`, `read`, …
    pub operation: &'static str,
    /// The path in the mount.
    pub path: String,
    /// What the system call answered, by number.
    pub errno: i32,
    /// The reason.
    pub reason: String,
    /// How often it happened in a row.
    pub times: u64,
}

/// A bounded list of failures, oldest first.
#[derive(Debug)]
pub struct Journal {
    entries: Mutex<VecDeque<Failure>>,
    entries_max: usize,
}

impl Journal {
    /// A journal of at most `entries_max` failures.
    #[must_use]
    pub fn new(entries_max: usize) -> Self {
        Self {
            entries: Mutex::default(),
            entries_max: entries_max.max(1),
        }
    }

    /// Writes a failure down, and into the log.
    pub fn record(&self, operation: &'static str, path: &str, error: &Error) {
        if !error.is_notable() {
            return;
        }
        match error {
            Error::NotFound { .. } | Error::NotListable { .. } => {
                tracing::debug!(operation, path, %error, "failed");
            }
            _ => tracing::warn!(operation, path, %error, "failed"),
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis();
        let at_ms = u64::try_from(now).unwrap_or(u64::MAX);
        let reason = error.to_string();
        let mut entries = self.entries.lock();
        if let Some(last) = entries.back_mut()
            && last.operation == operation
            && last.path == path
            && last.reason == reason
        {
            last.at_ms = at_ms;
            last.times += 1;
            return;
        }
        if entries.len() == self.entries_max {
            entries.pop_front();
        }
        let path = path.to_owned();
        entries.push_back(Failure {
            at_ms,
            operation,
            path,
            errno: error.errno(),
            reason,
            times: 1,
        });
    }

    /// The failures, oldest first.
    #[must_use]
    pub fn entries(&self) -> Vec<Failure> {
        self.entries.lock().iter().cloned().collect()
    }

    /// The failures, and others from elsewhere, as lines in the order of time: time, operation, path, errno, reason.
    #[must_use]
    pub fn to_text(&self, others: Vec<Failure>) -> String {
        let mut failures = self.entries();
        failures.extend(others);
        failures.sort_by_key(|failure| failure.at_ms);
        let line = |failure: &Failure| {
            let Failure {
                at_ms,
                operation,
                path,
                errno,
                reason,
                times,
            } = failure;
            let errno = nix::errno::Errno::from_raw(*errno);
            let times = if *times > 1 {
                format!(" ({times} times)")
            } else {
                String::new()
            };
            let (seconds, ms) = (at_ms / 1000, at_ms % 1000);
            format!("{seconds}.{ms:03} {operation} {path}: {errno:?}: {reason}{times}\n")
        };
        failures.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_counts_repeats_and_leaves_out_the_everyday() {
        let journal = Journal::new(2);
        for number in 0..3 {
            journal.record("lookup", &format!("a/{number}"), &Error::not_found("a", "absent"));
        }
        journal.record("lookup", "a/2", &Error::not_found("a", "absent"));
        journal.record("read", "b", &Error::posix("b", libc::EISDIR));
        let entries = journal.entries();
        let seen: Vec<_> = entries.iter().map(|e| (e.path.as_str(), e.times)).collect();
        assert_eq!(seen, [("a/1", 1), ("a/2", 2)]);
        assert!(
            journal
                .to_text(Vec::new())
                .ends_with("lookup a/2: ENOENT: a: not found: absent (2 times)\n")
        );
    }
}
