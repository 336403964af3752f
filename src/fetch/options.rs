//! What whoever starts a fetcher decides.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::PlainLayers;
use crate::fetch::background::BackgroundOptions;

/// What the configuration says about layers without a table of contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainLimits {
    /// Whether they are read at all.
    pub plain_layers: PlainLayers,
    /// The largest blob that is read as a whole, in bytes.
    pub bytes_max: Option<u64>,
}

/// How a fetcher works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchOptions {
    /// What a small read may take in total.
    pub timeout: Duration,
    /// The size that the cache is kept below, in bytes.
    pub budget_bytes: Option<u64>,
    /// What is done about layers without a table of contents.
    pub plain: PlainLimits,
    /// Where machines leave each other the indexes of such layers.
    pub shared_index_dir: Option<PathBuf>,
    /// What is brought before anybody needs it.
    pub background: BackgroundOptions,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(60),
            budget_bytes: None,
            plain: PlainLimits {
                plain_layers: PlainLayers::Index,
                bytes_max: None,
            },
            shared_index_dir: None,
            background: BackgroundOptions::default(),
        }
    }
}
