//! The one error type of the crate and the one table that says what each case is at the edge: an errno on the FUSE
//! tree, an exit code of the command, a level in the log. Errors are cloneable because one failed fetch may answer
//! many readers. No variant ever holds a secret or a signed query string: whoever builds one redacts first.

use std::io;

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Every variant names the thing it happened to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[serde(tag = "error", rename_all = "snake_case")]
pub enum Error {
    /// No such repository, tag, path, platform.
    #[error("{what}: not found: {why}")]
    NotFound {
        /// The thing that was asked for.
        what: String,
        /// What was tried, and the remedy where there is one.
        why: String,
    },
    /// A name that can be walked through but has no listing (ENXIO: glibc takes ENOENT from a directory read as its end).
    #[error("{what}: cannot be listed: {why}")]
    NotListable {
        /// The directory.
        what: String,
        /// Why it has no listing.
        why: String,
    },
    /// The registry refused: 401 after one renewal, 403, or no credentials where some are needed.
    #[error("{what}: access denied: {why}")]
    Denied {
        /// The thing that was asked for.
        what: String,
        /// Who refused and which source of credentials was used.
        why: String,
    },
    /// Credentials that could not be looked up: a credential helper failed. The registry has said nothing.
    #[error("{what}: no credentials: {why}")]
    NoCredentials {
        /// The thing that was asked for.
        what: String,
        /// Which source failed, and how.
        why: String,
    },
    /// Refused or reset connections, DNS, TLS, 5xx after the retries, an open breaker.
    #[error("{what}: network failure: {why}")]
    Network {
        /// The thing that was asked for, with the host.
        what: String,
        /// The failure.
        why: String,
    },
    /// No answer within the deadline.
    #[error("{what}: no answer within {waited_ms} ms")]
    Timeout {
        /// The thing that was asked for.
        what: String,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// The user interrupted the wait.
    #[error("interrupted")]
    Interrupted,
    /// Bytes that do not have the digest they were promised to have.
    #[error("{what}: verification failed: expected {expected}, got {actual}")]
    Verification {
        /// The thing that was verified.
        what: String,
        /// The promised digest.
        expected: String,
        /// The digest of what came.
        actual: String,
    },
    /// Bytes from outside that break their format's rules, or a lying answer to a range request.
    #[error("{what}: malformed: {why}")]
    Malformed {
        /// The thing that was parsed.
        what: String,
        /// The broken rule.
        why: String,
    },
    /// Something valid that registryfs cannot do (yet), such as a layer format.
    #[error("{what}: not supported: {why}")]
    Unsupported {
        /// The thing.
        what: String,
        /// What about it, and the remedy.
        why: String,
    },
    /// Offline mode, and the answer is not in the cache.
    #[error("{what}: offline and not in the cache")]
    Offline {
        /// The thing that was asked for.
        what: String,
    },
    /// A command line, reference or configuration that cannot be meant.
    #[error("{message}")]
    Usage {
        /// The sentence for the user, naming the culprit and the remedy.
        message: String,
    },
    /// The thing is in use, or conflicts with what already runs.
    #[error("{what}: {why}")]
    Busy {
        /// The thing that is in use.
        what: String,
        /// Who uses it.
        why: String,
    },
    /// A local system call failed.
    #[error("{what}: {why}")]
    Io {
        /// The file or the operation.
        what: String,
        /// The errno, 0 where there is none.
        errno: i32,
        /// The system's message.
        why: String,
    },
    /// An operation that makes no sense on that kind of inode (ENOTDIR, EISDIR, EINVAL, ENODATA, ESTALE, EROFS).
    #[error("{what}: {}", io::Error::from_raw_os_error(*errno))]
    Posix {
        /// The inode or name.
        what: String,
        /// The errno to answer.
        errno: i32,
    },
}

impl Error {
    /// [`Error::NotFound`].
    pub fn not_found(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::NotFound {
            what: what.into(),
            why: why.into(),
        }
    }

    /// [`Error::Denied`].
    pub fn denied(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Denied {
            what: what.into(),
            why: why.into(),
        }
    }

    /// [`Error::NoCredentials`].
    pub fn no_credentials(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::NoCredentials {
            what: what.into(),
            why: why.into(),
        }
    }

    /// [`Error::Network`].
    pub fn network(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Network {
            what: what.into(),
            why: why.into(),
        }
    }

    /// [`Error::Malformed`].
    pub fn malformed(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Malformed {
            what: what.into(),
            why: why.into(),
        }
    }

    /// [`Error::Unsupported`].
    pub fn unsupported(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unsupported {
            what: what.into(),
            why: why.into(),
        }
    }

    /// [`Error::Usage`].
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage {
            message: message.into(),
        }
    }

    /// [`Error::Busy`].
    pub fn busy(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Busy {
            what: what.into(),
            why: why.into(),
        }
    }

    /// [`Error::Posix`].
    pub fn posix(what: impl Into<String>, errno: i32) -> Self {
        Self::Posix {
            what: what.into(),
            errno,
        }
    }

    /// [`Error::Verification`] between two digests.
    pub fn mismatch(what: impl Into<String>, expected: impl ToString, actual: impl ToString) -> Self {
        let (expected, actual) = (expected.to_string(), actual.to_string());
        Self::Verification {
            what: what.into(),
            expected,
            actual,
        }
    }

    /// A failed system call or file operation on `what`.
    pub fn io(what: impl Into<String>, error: &io::Error) -> Self {
        Self::Io {
            what: what.into(),
            errno: error.raw_os_error().unwrap_or(0),
            why: error.to_string(),
        }
    }

    /// The same failure, of a part of the thing that it names.
    #[must_use]
    pub fn of_part(mut self, part: &str) -> Self {
        match &mut self {
            Self::NotFound { what, .. }
            | Self::NotListable { what, .. }
            | Self::Denied { what, .. }
            | Self::NoCredentials { what, .. }
            | Self::Network { what, .. }
            | Self::Timeout { what, .. }
            | Self::Verification { what, .. }
            | Self::Malformed { what, .. }
            | Self::Unsupported { what, .. }
            | Self::Offline { what }
            | Self::Busy { what, .. }
            | Self::Io { what, .. }
            | Self::Posix { what, .. } => *what = format!("{part} of {what}"),
            Self::Usage { .. } | Self::Interrupted => {}
        }
        self
    }

    /// The table of `README.md`, "Errors", first column to second: what a system call on the tree answers.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotFound { .. } => libc::ENOENT,
            Self::NotListable { .. } => libc::ENXIO,
            Self::Denied { .. } | Self::NoCredentials { .. } => libc::EACCES,
            Self::Timeout { .. } => libc::ETIMEDOUT,
            Self::Interrupted => libc::EINTR,
            Self::Offline { .. } => libc::EHOSTUNREACH,
            Self::Busy { .. } => libc::EBUSY,
            Self::Usage { .. } => libc::EINVAL,
            Self::Posix { errno, .. } => *errno,
            // A local failure (a full disk, a broken file) means nothing to a reader of the tree but "could not be read".
            Self::Network { .. }
            | Self::Verification { .. }
            | Self::Malformed { .. }
            | Self::Unsupported { .. }
            | Self::Io { .. } => libc::EIO,
        }
    }

    /// The table of `README.md`, "Errors", first column to third: how the command exits.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } => 2,
            Self::Denied { .. } | Self::NoCredentials { .. } => 3,
            Self::NotFound { .. } | Self::NotListable { .. } => 4,
            Self::Network { .. } | Self::Offline { .. } => 5,
            Self::Timeout { .. } => 6,
            Self::Verification { .. } | Self::Malformed { .. } => 7,
            Self::Interrupted => 130,
            Self::Posix { errno, .. } if *errno == libc::ENOENT => 4,
            Self::Unsupported { .. } | Self::Busy { .. } | Self::Io { .. } | Self::Posix { .. } => 1,
        }
    }

    /// Whether trying the same thing again later may help: the network, not the content, was at fault.
    #[must_use]
    pub fn is_network(&self) -> bool {
        matches!(
            self,
            Self::Network { .. } | Self::Timeout { .. } | Self::Offline { .. }
        )
    }

    /// Whether a user should find this in the journal of failed operations: all but everyday answers such as ENOENT.
    #[must_use]
    pub fn is_notable(&self) -> bool {
        !matches!(self, Self::Posix { .. } | Self::Interrupted)
    }
}
