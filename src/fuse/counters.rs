//! How many requests the kernel sent, by operation: what shows that a warm tree is served without the daemon.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Op {
    Access,
    Flush,
    Forget,
    Getattr,
    Getxattr,
    Ioctl,
    Listxattr,
    Lookup,
    Lseek,
    Open,
    Opendir,
    Read,
    Readdir,
    Readdirplus,
    Readlink,
    Release,
    Statfs,
    /// Everything that would change something.
    Write,
}

/// The names of [`Op`], in its order.
const NAMES: [&str; 18] = [
    "access",
    "flush",
    "forget",
    "getattr",
    "getxattr",
    "ioctl",
    "listxattr",
    "lookup",
    "lseek",
    "open",
    "opendir",
    "read",
    "readdir",
    "readdirplus",
    "readlink",
    "release",
    "statfs",
    "write",
];

impl Op {
    /// The name of the operation in counters and logs.
    pub(super) fn name(self) -> &'static str {
        NAMES.get(self as usize).copied().unwrap_or("unknown")
    }
}

/// The live counters of a mount.
#[derive(Debug, Default)]
pub(super) struct Requests([AtomicU64; NAMES.len()]);

impl Requests {
    /// Counts one request.
    pub(super) fn count(&self, op: Op) {
        if let Some(counter) = self.0.get(op as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What was counted so far.
    pub(super) fn snapshot(&self) -> Counters {
        let by_operation: BTreeMap<_, _> = NAMES
            .iter()
            .zip(&self.0)
            .map(|(name, counter)| (*name, counter.load(Ordering::Relaxed)))
            .collect();
        Counters {
            total: by_operation.values().sum(),
            by_operation,
        }
    }
}

/// Requests of a mount since it began.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// All requests of the operations below; the few others (such as poll) are sent once and answered ENOSYS.
    pub total: u64,
    /// Requests by operation; operations without one are listed with 0.
    pub by_operation: BTreeMap<&'static str, u64>,
}

impl Counters {
    /// The requests of one operation, by its name in [`Counters::by_operation`].
    #[must_use]
    pub fn of(&self, operation: &str) -> u64 {
        self.by_operation.get(operation).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_counts_under_its_own_name() {
        let requests = Requests::default();
        for (op, name) in [
            (Op::Access, "access"),
            (Op::Readdirplus, "readdirplus"),
            (Op::Write, "write"),
        ] {
            requests.count(op);
            assert_eq!(op.name(), name);
            assert_eq!(requests.snapshot().of(name), 1);
        }
        assert_eq!(requests.snapshot().total, 3);
        assert_eq!(NAMES.len(), Op::Write as usize + 1);
    }
}
