//! Ends the process when one execution takes too long, after the input was kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::engine::say;

/// CPU time of one execution, so that a busy machine makes no difference. Unoptimised code gets more.
const CPU_MAX: Duration = Duration::from_secs(if cfg!(debug_assertions) { 20 } else { 2 });
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The number of no execution.
const IDLE: u64 = 0;

/// A thread that looks at the one that made it.
#[derive(Debug)]
pub(crate) struct Watch(Arc<AtomicU64>);

impl Watch {
    /// `current` has the input.
    pub(crate) fn new(current: PathBuf) -> Self {
        let executions = Arc::new(AtomicU64::new(IDLE));
        let watched = Arc::clone(&executions);
        let task = PathBuf::from(format!("/proc/self/task/{}/schedstat", nix::unistd::gettid()));
        std::thread::spawn(move || watch(&watched, &task, &current));
        Self(executions)
    }

    /// An execution begins.
    pub(crate) fn next(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// No execution runs.
    pub(crate) fn idle(&self) {
        self.0.store(IDLE, Ordering::Relaxed);
    }
}

fn watch(executions: &AtomicU64, task: &Path, current: &Path) {
    let (mut number, mut since) = (0, Duration::ZERO);
    loop {
        std::thread::sleep(LOOK_EVERY);
        let now = executions.load(Ordering::Relaxed);
        if now == IDLE {
            continue;
        }
        // The thread that is watched has ended when its figures are gone.
        let Some(used) = cpu_time(task) else { return };
        if now != number {
            (number, since) = (now, used);
        } else if used.saturating_sub(since) > CPU_MAX {
            let kept = current.with_extension("hang");
            let _ = std::fs::copy(current, &kept);
            say(&format!(
                "one execution took more than {CPU_MAX:?} of CPU time; see FUZZ_REPLAY={}",
                kept.display()
            ));
            std::process::exit(101);
        }
    }
}

/// CPU time of a thread: the first number of its `schedstat`, in nanoseconds.
fn cpu_time(task: &Path) -> Option<Duration> {
    let text = std::fs::read_to_string(task).ok()?;
    let nanos = text.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanos))
}
