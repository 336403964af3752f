//! Platforms: which of an index's manifests is meant.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// An operating system, an architecture and its variant, in Go's spelling as the OCI image index uses it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Platform {
    /// `linux`, …
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v7`, `v8`, … or nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// The platform that this program was built for.
    #[must_use]
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", None),
            "arm" => ("arm", Some("v7".to_owned())),
            "powerpc64" => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant,
        }
    }

    /// Whether an image for `other` is what someone who wants `self` means: variants count only where both name one, and
    /// `arm64` is `arm64/v8`.
    #[must_use]
    pub fn accepts(&self, other: &Self) -> bool {
        self.os == other.os
            && self.architecture == other.architecture
            && match (&self.variant, &other.variant) {
                (Some(wanted), Some(offered)) => wanted == offered,
                (Some(wanted), None) => self.architecture == "arm64" && wanted == "v8",
                (None, _) => true,
            }
    }

    /// The name in `platforms/`: `OS-ARCH[-VARIANT]`.
    #[must_use]
    pub fn dir_name(&self) -> String {
        self.to_string().replace('/', "-")
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant
            .iter()
            .try_for_each(|variant| write!(f, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// Parses `OS/ARCH[/VARIANT]`; anything else is [`Error::Usage`].
    fn from_str(text: &str) -> Result<Self, Error> {
        let valid = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric());
        let parts: Vec<&str> = text.split('/').collect();
        match parts.as_slice() {
            [os, architecture, variant @ ..] if variant.len() <= 1 && parts.iter().all(|p| valid(p)) => {
                Ok(Self {
                    os: (*os).to_owned(),
                    architecture: (*architecture).to_owned(),
                    variant: variant.first().map(|&v| v.to_owned()),
                })
            }
            _ => Err(Error::usage(format!(
                "{text:?} is no platform: write OS/ARCH or OS/ARCH/VARIANT, such as linux/arm64"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_count_only_where_both_name_one() {
        let platform = |text: &str| text.parse::<Platform>().unwrap();
        assert!(platform("linux/amd64").accepts(&platform("linux/amd64")));
        assert!(platform("linux/arm64").accepts(&platform("linux/arm64/v8")));
        assert!(platform("linux/arm64/v8").accepts(&platform("linux/arm64")));
        assert!(!platform("linux/arm/v6").accepts(&platform("linux/arm/v7")));
        assert!(!platform("linux/arm/v6").accepts(&platform("linux/arm")));
        assert!(!platform("linux/amd64").accepts(&platform("windows/amd64")));
        assert_eq!(platform("linux/arm/v7").dir_name(), "linux-arm-v7");
    }

    #[test]
    fn what_is_no_platform_is_a_usage_error() {
        for text in ["", "linux", "linux/", "linux/a/b/c", "linux/a b", "../x"] {
            assert_eq!(text.parse::<Platform>().unwrap_err().exit_code(), 2, "{text}");
        }
    }
}
