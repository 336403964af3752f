//! What a name can mean below a directory of the tree of names, by its spelling alone: `README.md`, "The tree".

use crate::digest::Digest;
use crate::registry::reference::{Target, is_component, is_tag};

/// Names that an image gives its own meaning to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum OwnName {
    /// The merged root filesystem.
    Rootfs,
    /// The layers.
    Layers,
    /// The platform's manifest.
    Manifest,
    /// The platform's configuration.
    Config,
    /// The digest that the reference names.
    Digest,
    /// The index, where the reference names one.
    Index,
    /// The images of the index.
    Platforms,
}

impl OwnName {
    /// All of them, in the order of a listing. The last two only exist where the reference names an index.
    pub(super) const ALL: [Self; 7] = [
        Self::Rootfs,
        Self::Layers,
        Self::Manifest,
        Self::Config,
        Self::Digest,
        Self::Index,
        Self::Platforms,
    ];

    /// The name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rootfs => "rootfs",
            Self::Layers => "layers",
            Self::Manifest => "manifest.json",
            Self::Config => "config.json",
            Self::Digest => "digest",
            Self::Index => "index.json",
            Self::Platforms => "platforms",
        }
    }

    /// Whether it is a directory.
    pub(super) fn is_dir(self) -> bool {
        matches!(self, Self::Rootfs | Self::Layers | Self::Platforms)
    }

    /// Whether only an index has it.
    pub(super) fn of_index(self) -> bool {
        matches!(self, Self::Index | Self::Platforms)
    }
}

/// What a name below a registry or a repository can mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning<'a> {
    /// One of an image's own names.
    Own(OwnName),
    /// `component:tag` or `component@digest`: always an image.
    Image { component: &'a str, target: Target },
    /// A digest of the parent repository: always an image.
    Digest(Digest),
    /// A bare name: a tag, a repository component, or both.
    Bare {
        name: &'a str,
        tag: bool,
        component: bool,
    },
    /// Nothing.
    Nothing,
}

/// Says what a name can mean.
pub(super) fn meaning(name: &[u8]) -> Meaning<'_> {
    let Ok(name) = std::str::from_utf8(name) else {
        return Meaning::Nothing;
    };
    if let Some(own) = OwnName::ALL.into_iter().find(|own| own.name() == name) {
        return Meaning::Own(own);
    }
    if let Ok(digest) = name.parse::<Digest>() {
        return Meaning::Digest(digest);
    }
    if let Some((rest, digest)) = name.split_once('@') {
        // A tag before the digest is checked and then passed over: the digest wins.
        let (component, tag) = rest
            .split_once(':')
            .map_or((rest, None), |(component, tag)| (component, Some(tag)));
        return match digest.parse() {
            Ok(digest) if is_component(component) && tag.is_none_or(is_tag) => Meaning::Image {
                component,
                target: Target::Digest(digest),
            },
            _ => Meaning::Nothing,
        };
    }
    if let Some((component, tag)) = name.split_once(':') {
        return match is_component(component) && is_tag(tag) {
            true => Meaning::Image {
                component,
                target: Target::Tag(tag.to_owned()),
            },
            false => Meaning::Nothing,
        };
    }
    match (is_tag(name), is_component(name)) {
        (false, false) => Meaning::Nothing,
        (tag, component) => Meaning::Bare { name, tag, component },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_the_design_says() {
        let digest = Digest::of(b"");
        let text = digest.to_string();
        assert_eq!(meaning(b"rootfs"), Meaning::Own(OwnName::Rootfs));
        assert_eq!(meaning(text.as_bytes()), Meaning::Digest(digest));
        let image = |component, target| Meaning::Image { component, target };
        assert_eq!(
            meaning(b"debian:12"),
            image("debian", Target::Tag("12".to_owned()))
        );
        let at = format!("debian@{text}");
        assert_eq!(meaning(at.as_bytes()), image("debian", Target::Digest(digest)));
        let both = format!("debian:12@{text}");
        assert_eq!(meaning(both.as_bytes()), image("debian", Target::Digest(digest)));
        assert_eq!(
            meaning(b"debian"),
            Meaning::Bare {
                name: "debian",
                tag: true,
                component: true
            }
        );
        assert_eq!(
            meaning(b"V1"),
            Meaning::Bare {
                name: "V1",
                tag: true,
                component: false
            }
        );
        for nothing in [
            "", ".git", "a b", "a:", ":a", "A:1", "a@b", "a:b:c", "-x", "\u{e4}",
        ] {
            assert_eq!(meaning(nothing.as_bytes()), Meaning::Nothing, "{nothing}");
        }
        assert_eq!(meaning(b"\xff"), Meaning::Nothing);
    }
}
