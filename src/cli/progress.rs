//! Progress bars: on standard error, if that is a terminal and nobody has asked for silence. What takes long is said on a
//! line of its own where there is no terminal.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

use super::globals::Globals;
use super::output::note;
use super::text::human_bytes;
use crate::daemon::log::Verbosity;
use crate::digest::Digest;
use crate::fetch::PassProgress;

/// How often the bar looks where it is.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The bar that is shown: a command has one at most.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);
/// The bar for the layers that are waited for, where there is no other; and the layers of which a line was printed.
static WAITING: Mutex<(Option<ProgressBar>, Vec<Digest>)> = Mutex::new((None, Vec::new()));

/// Does what writes to standard error, with the bar out of its way.
pub(super) fn beside_bar(write: impl FnOnce()) {
    match &*SHOWN.lock() {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// A bar for bytes. It goes away when it is dropped.
#[derive(Debug)]
pub(super) struct Bar {
    bar: ProgressBar,
    about: String,
}

impl Bar {
    /// A bar that says what it is about until the number of bytes is known.
    pub(super) fn new(globals: &Globals, about: &str) -> Self {
        let is_shown = has_bars(globals);
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
        let about = about.to_owned();
        Self { bar, about }
    }

    /// Shows how far it is; `total_bytes` is 0 until it is known.
    pub(super) fn show(&self, done_bytes: u64, total_bytes: u64) {
        if total_bytes == 0 {
            return;
        }
        if self.bar.length() != Some(total_bytes) {
            self.bar.set_message(self.about.clone());
            self.bar.set_style(style(
                "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left",
            ));
            self.bar.set_length(total_bytes);
            self.bar.reset_eta();
        }
        self.bar.set_position(done_bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        *SHOWN.lock() = None;
        self.bar.finish_and_clear();
    }
}

/// Whether bars are shown: log lines and a bar would write over each other.
fn has_bars(globals: &Globals) -> bool {
    stderr().is_terminal() && !globals.no_progress && globals.verbosity() == Verbosity::Quiet
}

/// What shows the layers that are being read as a whole while a command waits for them.
pub(super) fn show_passes(globals: &Globals) -> fn(&[PassProgress]) {
    match () {
        () if globals.no_progress => |_| {},
        () if has_bars(globals) => draw_passes,
        () => |passes| {
            let told = &mut WAITING.lock().1;
            for pass in passes.iter().filter(|pass| pass.done_bytes > 0) {
                if !told.contains(&pass.layer) {
                    told.push(pass.layer);
                    note(&pass_text(pass));
                }
            }
        },
    }
}

/// Draws them, in the bar that is there or in one of their own.
fn draw_passes(passes: &[PassProgress]) {
    let mut waiting = WAITING.lock();
    let Some(first) = passes.first() else {
        if let Some(bar) = waiting.0.take() {
            bar.finish_and_clear();
        }
        return;
    };
    let mut text = pass_text(first);
    if let Some(left_s) = first.left_s.filter(|_| first.done_bytes > 0) {
        text.push_str(&format!(", {left_s} s left"));
    }
    if passes.len() > 1 {
        text.push_str(&format!(", and {} more", passes.len() - 1));
    }
    if let Some(bar) = &*SHOWN.lock() {
        bar.set_message(text);
        return;
    }
    let bar = waiting.0.get_or_insert_with(|| {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style("{spinner} {msg}"));
        bar.enable_steady_tick(LOOK_INTERVAL);
        bar
    });
    bar.set_message(text);
}

/// A pass in words.
fn pass_text(pass: &PassProgress) -> String {
    let layer = match (pass.number, pass.layers) {
        (Some(number), Some(layers)) => format!("layer {} of {layers}", number + 1),
        _ => format!("layer {}", pass.layer),
    };
    let (done, total) = (human_bytes(pass.done_bytes), human_bytes(pass.total_bytes));
    format!("reading {layer} once: {done} of {total}")
}

fn style(template: &str) -> ProgressStyle {
    // A template of ours that is wrong shows in its test.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
