//! Where an answer comes from: over the network, or from a layout on disk. What is read is the same for both.

use std::time::Duration;

use bytes::Bytes;

use super::endpoint::Provenance;
use super::layout::{LayoutBody, LayoutList};
use super::{blob, paging};
use crate::error::Result;

/// The bytes of one range of a blob, as they come. Dropping it ends its request.
#[derive(Debug)]
pub enum BlobBody {
    /// From a registry.
    Registry(Box<blob::BlobBody>),
    /// From a layout.
    Layout(LayoutBody),
}

impl BlobBody {
    /// How many bytes are still to come.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        match self {
            Self::Registry(body) => body.remaining(),
            Self::Layout(body) => body.remaining(),
        }
    }

    /// Who gives the bytes: whoever finds them wrong tells it, and asks again. A layout gives them itself.
    #[must_use]
    pub fn provenance(&self) -> Provenance {
        match self {
            Self::Registry(body) => body.provenance(),
            Self::Layout(_) => Provenance::default(),
        }
    }

    /// Whoever takes the bytes stood still for so long, for reasons of his own. It does not count as time that they took.
    pub fn rested(&mut self, time: Duration) {
        if let Self::Registry(body) = self {
            body.rested(time);
        }
    }

    /// The next bytes; `None` once the whole range has come.
    ///
    /// # Errors
    /// [`crate::error::Error::Malformed`] for an answer that lies about its range or a file that was cut short,
    /// [`crate::error::Error::Unsupported`] where a registry does not honour ranges, [`crate::error::Error::Timeout`],
    /// [`crate::error::Error::Io`], and all other errors of asking a registry: resuming may need all of it.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        match self {
            Self::Registry(body) => body.next().await,
            Self::Layout(body) => body.next().await,
        }
    }
}

impl BlobBody {
    /// All of it as one piece, of at most 64 MiB.
    pub(super) async fn collect(self) -> Result<Bytes> {
        match self {
            Self::Registry(body) => blob::collect(*body).await,
            Self::Layout(body) => body.collect(blob::COLLECTED_BYTES_MAX).await,
        }
    }
}

/// A list of names that is being read page by page.
#[derive(Debug)]
pub enum Pager {
    /// A registry's.
    Registry(Box<paging::Pager>),
    /// A layout's, in one page, until that is read.
    Layout(Option<LayoutList>),
}

impl Pager {
    /// The names of the next page, `None` after the last. Names that break the grammar of references are left out:
    /// nothing could be asked for by them.
    ///
    /// # Errors
    /// [`crate::error::Error::NotFound`], [`crate::error::Error::Denied`] or [`crate::error::Error::Unsupported`] if
    /// there is no such list or it is not for us; [`crate::error::Error::Malformed`] for a list that never ends or leads
    /// elsewhere; those of the network.
    pub async fn next_page(&mut self) -> Result<Option<Vec<String>>> {
        match self {
            Self::Registry(pager) => pager.next_page().await,
            Self::Layout(list) => match list.take() {
                Some(list) => list.read().await.map(Some),
                None => Ok(None),
            },
        }
    }

    /// Whether a page was asked for with credentials. The registry may give the list to everyone all the same.
    #[must_use]
    pub fn with_credentials(&self) -> bool {
        match self {
            Self::Registry(pager) => pager.with_credentials(),
            Self::Layout(_) => false,
        }
    }
}
