//! Ends the wait of a caller who was interrupted.
//!
//! fuser switches the kernel's own INTERRUPT messages off, and read-ahead never gets any, so a caller would wait for
//! the answer whatever signal it gets. A request that is held for a while therefore looks at the pending signals of the
//! thread that waits for it, which the kernel shows in `/proc/TID/status`, and is answered EINTR when one has come.

use std::io;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::error::{Error, Result};

/// How long a request is held before the signals of its caller are looked at: most are answered long before.
const GRACE: Duration = Duration::from_millis(200);
/// How often they are looked at, at first. The interval grows with the wait, as patience does.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// How often they are looked at when the wait is long.
const INTERVAL_MAX: Duration = Duration::from_millis(400);

/// The signals by which people and supervisors end a program.
const ENDING: &[i32] = &[libc::SIGINT, libc::SIGTERM, libc::SIGQUIT, libc::SIGHUP];
/// Signals that say something but ask for no end of what the thread is doing.
const HARMLESS: &[i32] = &[
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
    libc::SIGPROF,
    libc::SIGVTALRM,
    libc::SIGSTOP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGIO,
    libc::SIGPWR,
];

/// Which pending signals end a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// All but the harmless ones, as an interruptible system call on a network filesystem does.
    Interruptible,
    /// Those that end a program only. A buffered read never fails with EINTR elsewhere, and a page fault that fails is
    /// a SIGBUS, so a timer's signal must not end it.
    Killable,
}

impl Patience {
    fn counts(self) -> u64 {
        match self {
            Self::Interruptible => !mask_of(HARMLESS),
            Self::Killable => mask_of(ENDING),
        }
    }
}

/// The thread that waits for a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiter {
    thread_id: Option<i32>,
    patience: Patience,
}

impl Waiter {
    /// The thread that the request names; 0 is one that this pid namespace cannot see, and is not watched.
    pub(super) fn new(thread_id: u32, patience: Patience) -> Self {
        let thread_id = i32::try_from(thread_id).ok().filter(|&id| id != 0);
        Self { thread_id, patience }
    }

    /// Runs `work` to its end, or drops it when the waiting thread was interrupted or is gone.
    pub(super) async fn hold<T>(self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            result = work => result,
            () = self.interrupted() => Err(Error::Interrupted),
        }
    }

    async fn interrupted(self) {
        let Some(thread_id) = self.thread_id else {
            return std::future::pending().await;
        };
        let mut held = GRACE;
        tokio::time::sleep(GRACE).await;
        loop {
            match is_interrupted(thread_id, self.patience) {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(thread_id, %error, "the signals of a waiting thread cannot be watched");
                    return std::future::pending().await;
                }
            }
            let interval = (held / 10).clamp(INTERVAL_MIN, INTERVAL_MAX);
            tokio::time::sleep(interval).await;
            held += interval;
        }
    }
}

/// Whether a signal waits that ends the thread's wait, or the thread waits no more.
fn is_interrupted(thread_id: i32, patience: Patience) -> io::Result<bool> {
    match std::fs::read_to_string(format!("/proc/{thread_id}/status")) {
        Ok(status) => Ok(status_is_interrupted(&status, patience)),
        Err(error) => match error.raw_os_error() {
            // A /proc with hidepid also answers ENOENT for a thread of someone else that lives.
            Some(libc::ENOENT | libc::ESRCH) => Ok(kill(Pid::from_raw(thread_id), None) == Err(Errno::ESRCH)),
            _ => Err(error),
        },
    }
}

/// Reads a `/proc/TID/status` (proc_pid_status(5)).
fn status_is_interrupted(status: &str, patience: Patience) -> bool {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map_or("", str::trim)
    };
    let mask = |name: &str| u64::from_str_radix(field(name), 16).unwrap_or(0);
    if field("State").starts_with(['Z', 'X']) {
        return true;
    }
    let pending = mask("SigPnd") | mask("ShdPnd");
    let held_back = mask("SigBlk") | mask("SigIgn");
    let deciding = pending & !held_back & patience.counts();
    deciding != 0 || pending & mask_of(&[libc::SIGKILL]) != 0
}

/// The bits of signals in a mask of `/proc`: signal 1 is bit 0.
fn mask_of(signals: &[i32]) -> u64 {
    signals.iter().fold(0, |mask, signal| mask | 1 << (signal - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: char, thread: u64, shared: u64, blocked: u64, ignored: u64) -> String {
        format!(
            "Name:\tls\nUmask:\t0022\nState:\t{state} (x)\nTgid:\t7\nSigQ:\t0/31\nSigPnd:\t{thread:016x}\n\
             ShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t0000000000000000\n"
        )
    }

    fn bit(signal: i32) -> u64 {
        1 << (signal - 1)
    }

    #[test]
    fn a_pending_sigint_interrupts_unless_blocked_or_ignored() {
        for patience in [Patience::Interruptible, Patience::Killable] {
            let int = bit(libc::SIGINT);
            assert!(status_is_interrupted(&status('S', 0, int, 0, 0), patience));
            assert!(status_is_interrupted(&status('D', int, 0, 0, 0), patience));
            assert!(!status_is_interrupted(&status('S', 0, int, int, 0), patience));
            assert!(!status_is_interrupted(&status('S', 0, int, 0, int), patience));
            assert!(!status_is_interrupted(&status('S', 0, 0, 0, 0), patience));
        }
    }

    #[test]
    fn a_kill_always_interrupts_and_a_dead_thread_waits_no_more() {
        let all = u64::MAX;
        for patience in [Patience::Interruptible, Patience::Killable] {
            assert!(status_is_interrupted(
                &status('D', bit(libc::SIGKILL), 0, all, all),
                patience
            ));
            assert!(status_is_interrupted(&status('Z', 0, 0, 0, 0), patience));
        }
    }

    #[test]
    fn harmless_signals_interrupt_nothing_and_timers_no_read() {
        for &signal in HARMLESS {
            let text = status('S', bit(signal), bit(signal), 0, 0);
            assert!(!status_is_interrupted(&text, Patience::Interruptible), "{signal}");
        }
        let alarm = status('S', 0, bit(libc::SIGALRM), 0, 0);
        assert!(status_is_interrupted(&alarm, Patience::Interruptible));
        assert!(!status_is_interrupted(&alarm, Patience::Killable));
    }

    #[test]
    fn a_status_without_the_fields_interrupts_nothing() {
        assert!(!status_is_interrupted("", Patience::Interruptible));
        assert!(!status_is_interrupted(
            "SigPnd:\tzz\nShdPnd\n",
            Patience::Interruptible
        ));
    }

    #[test]
    fn this_thread_lives_and_an_impossible_one_does_not() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(!is_interrupted(me, Patience::Killable).unwrap());
        assert!(is_interrupted(i32::MAX, Patience::Killable).unwrap());
    }
}
