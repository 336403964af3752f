//! The options of `mount -o`, in the spelling of mount(8).

use std::path::PathBuf;
use std::str::FromStr;

use crate::config::Layer;
use crate::error::{Error, Result};

/// What `-o` said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MountOptions {
    /// `allow_other` or `noallow_other`.
    pub(super) allow_other: Option<bool>,
    /// `noexec`, unless `exec` follows.
    pub(super) no_exec: bool,
    /// Everything that is a setting too.
    pub(super) layer: Layer,
}

impl MountOptions {
    /// Reads the options; those that are not known are refused by name.
    pub(super) fn parse(options: &[String]) -> Result<Self> {
        let mut parsed = Self::default();
        for option in options.iter().filter(|option| !option.is_empty()) {
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Result<()> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        let layer = &mut self.layer;
        match (name, value) {
            // Registries are mounted read-only in any case.
            ("ro" | "defaults", None) => {}
            ("rw", None) => {
                return Err(Error::usage("-o rw: a registry can only be mounted read-only"));
            }
            ("allow_other", None) => self.allow_other = Some(true),
            ("noallow_other", None) => self.allow_other = Some(false),
            ("share_private", None) => layer.share_private = Some(true),
            ("noexec", None) => self.no_exec = true,
            ("exec", None) => self.no_exec = false,
            ("offline", None) => layer.offline = Some(true),
            ("plain_http", None) => layer.plain_http = Some(true),
            ("insecure", None) => layer.insecure = Some(true),
            ("kernel", Some(value)) => {
                let mode = value
                    .parse()
                    .map_err(|error: Error| Error::usage(format!("-o kernel={error}")))?;
                layer.kernel = Some(mode);
            }
            ("background", Some(value)) => {
                let mode = value
                    .parse()
                    .map_err(|error: Error| Error::usage(format!("-o background={error}")))?;
                layer.background = Some(mode);
            }
            ("platform", Some(value)) => layer.platform = Some(value.to_owned()),
            ("cache_dir", Some(value)) => layer.cache_dir = Some(PathBuf::from(value)),
            ("tag_ttl", Some(value)) => layer.tag_ttl_s = Some(number(name, value)?),
            ("lookup_wait", Some(value)) => layer.lookup_wait_s = Some(number(name, value)?),
            ("retries", Some(value)) => layer.retries = Some(number(name, value)?),
            ("timeout", Some(value)) => layer.timeout_s = Some(number(name, value)?),
            ("concurrency", Some(value)) => layer.concurrency = Some(number(name, value)?),
            ("ca", Some(value)) => layer.ca.get_or_insert_default().push(PathBuf::from(value)),
            ("allow", Some(value)) => layer.allow.get_or_insert_default().push(value.to_owned()),
            ("deny", Some(value)) => layer.deny.get_or_insert_default().push(value.to_owned()),
            _ => {
                return Err(Error::usage(format!(
                    "-o {name}: unknown option, or its value is missing or too much"
                )));
            }
        }
        Ok(())
    }
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T> {
    value
        .parse()
        .map_err(|_| Error::usage(format!("-o {name}={value}: not a whole number")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BackgroundMode;

    fn parse(text: &str) -> Result<MountOptions> {
        MountOptions::parse(&text.split(',').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn known_options_become_settings() {
        let options = parse(
            "ro,allow_other,share_private,platform=linux/arm64,tag_ttl=5,background=idle,allow=a.b,allow=c.d",
        )
        .unwrap();
        assert_eq!(options.allow_other, Some(true));
        assert_eq!(options.layer.share_private, Some(true));
        assert_eq!(options.layer.platform.as_deref(), Some("linux/arm64"));
        assert_eq!(options.layer.tag_ttl_s, Some(5));
        assert_eq!(options.layer.background, Some(BackgroundMode::Idle));
        assert_eq!(options.layer.allow.unwrap(), ["a.b", "c.d"]);
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for (text, name) in [
            ("colour", "colour"),
            ("ro=1", "ro"),
            ("platform", "platform"),
            ("retries=many", "retries"),
            ("background=sometimes", "background"),
            ("rw", "rw"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(name), "{error}");
        }
        // The secret of a mistyped option must not be shown.
        assert!(
            !parse("credential=u:hunter2")
                .unwrap_err()
                .to_string()
                .contains("hunter2")
        );
    }
}
