//! What was odd about an image's layers, for its users to read: a bounded list.

/// The most warnings that are kept word for word.
const KEPT_MAX: usize = 100;

/// A list of warnings that stops growing.
#[derive(Debug, Default)]
pub(super) struct Warnings {
    kept: Vec<String>,
    dropped: u64,
}

impl Warnings {
    /// Notes that the entry at `path` of layer `layer` is odd; `why` goes on from there.
    pub(super) fn entry(&mut self, layer: u16, path: &[u8], why: &str) {
        if self.kept.len() < KEPT_MAX {
            let path = String::from_utf8_lossy(path);
            self.kept.push(format!("layer {layer}: {path:?} {why}"));
        } else {
            self.dropped += 1;
        }
    }

    /// The warnings, and last how many are not among them.
    pub(super) fn into_list(mut self) -> Vec<String> {
        if self.dropped > 0 {
            self.kept.push(format!("and {} more", self.dropped));
        }
        self.kept
    }
}
