//! The secrets that pass through the configuration.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// A setting that may be a secret, such as the value of a header. It never prints itself.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretText(String);

impl SecretText {
    /// The text, for the one place that uses it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// `USER:PASS`. It never prints itself; it is serialised only into the pipe and the socket between processes of one
/// user.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential(String);

impl Credential {
    /// The text `USER:PASS`, for the one place that sends it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl FromStr for Credential {
    type Err = Error;

    /// Takes `USER:PASS`; the error does not quote what it got.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text.split_once(':') {
            Some((user, _)) if !user.is_empty() && !text.contains(['\n', '\r', '\0']) => {
                Ok(Self(text.to_owned()))
            }
            _ => Err(Error::usage("a credential is written USER:PASS, on one line")),
        }
    }
}
