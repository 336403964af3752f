//! Progress bars: on standard error, if that is a terminal and nobody has asked for silence.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

use super::globals::Globals;
use crate::daemon::log::Verbosity;

/// How often the bar looks where it is.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The bar that is shown: a command has one at most.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Does what writes to standard error, with the bar out of its way.
pub(super) fn beside_bar(write: impl FnOnce()) {
    match &*SHOWN.lock() {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// A bar for bytes. It goes away when it is dropped.
#[derive(Debug)]
pub(super) struct Bar(ProgressBar);

impl Bar {
    /// A bar that says what it is about until the number of bytes is known.
    pub(super) fn new(globals: &Globals, about: &str) -> Self {
        // Log lines and a bar would write over each other.
        let is_shown =
            stderr().is_terminal() && !globals.no_progress && globals.verbosity() == Verbosity::Quiet;
        let target = match is_shown {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(None, target).with_message(about.to_owned());
        bar.set_style(style("{spinner} {msg}"));
        if is_shown {
            bar.enable_steady_tick(LOOK_INTERVAL);
            *SHOWN.lock() = Some(bar.clone());
        }
        Self(bar)
    }

    /// Shows how far it is; `total_bytes` is 0 until it is known.
    pub(super) fn show(&self, done_bytes: u64, total_bytes: u64) {
        if total_bytes == 0 {
            return;
        }
        if self.0.length() != Some(total_bytes) {
            self.0.set_style(style(
                "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left",
            ));
            self.0.set_length(total_bytes);
            self.0.reset_eta();
        }
        self.0.set_position(done_bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        *SHOWN.lock() = None;
        self.0.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    // A template of ours that is wrong shows in its test.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
