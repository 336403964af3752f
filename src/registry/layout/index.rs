//! `index.json`: which images a layout holds, and what they are called.
//!
//! Tools name them in two annotations, in many ways: umoci and skopeo write a tag or anything else that was typed behind
//! the path, buildah whole references, containerd and BuildKit a whole reference beside its tag. Here each becomes one
//! repository and one tag (`README.md`, "Layouts"), so that a layout is a registry like any other.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::registry::manifest::{DOCKER_INDEX, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use crate::registry::reference::{DEFAULT_TAG, Repository, is_component, is_host, is_tag, layout_host};

/// What umoci, skopeo and buildah call an image (OCI image specification, annotations).
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// What containerd and BuildKit call it, a whole reference, where [`REF_NAME`] is its tag only.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// The most manifests of one layout.
const MANIFESTS_MAX: usize = 100_000;
/// How many names an error lists.
const SHOWN_NAMES_MAX: usize = 20;
/// How many warnings one reading gives.
const WARNINGS_MAX: usize = 100;
/// How much of a name a warning shows, in characters.
const SHOWN_NAME_CHARS_MAX: usize = 200;
/// The longest digest, of whatever algorithm: that of SHA-512 has 135 bytes.
const DIGEST_BYTES_MAX: usize = 256;
/// The longest own name; repositories may have more, directories rarely do.
const OWN_NAME_BYTES_MAX: usize = 128;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawIndex {
    schema_version: Option<u64>,
    #[serde(default)]
    manifests: Vec<RawDescriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    artifact_type: Option<String>,
}

/// An image of the layout: what `index.json` says of its manifest or index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The media type, where the layout states one.
    pub(super) media_type: Option<String>,
    /// The digest as it is written: it may be of an algorithm that is not ours.
    digest: String,
    /// Size in bytes.
    pub(super) size: u64,
    /// What [`REF_NAME`] says.
    ref_name: Option<String>,
    /// Repository and tag, where its names give some that are free.
    name: Option<(String, String)>,
}

impl Entry {
    /// The digest of the manifest or index.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming `what` for an algorithm that is not ours, [`Error::Malformed`] for what is no digest.
    pub(super) fn digest(&self, what: &str) -> Result<Digest> {
        let (algorithm, _) = self.digest.split_once(':').unwrap_or_default();
        if algorithm.is_empty() || algorithm == "sha256" {
            return self.digest.parse();
        }
        let algorithm: String = algorithm.chars().take(20).collect();
        let why = format!("its digest is a {algorithm} one; only sha256 is supported");
        Err(Error::unsupported(what, why))
    }
}

/// The images of a layout by their names.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::registry) struct Names {
    /// The repository of what has only a tag, or no name.
    own: String,
    entries: Vec<Entry>,
    /// Repository, tag, number of the entry.
    repositories: BTreeMap<String, BTreeMap<String, usize>>,
    /// What was left out or is not found by its name, and why.
    pub(super) warnings: Vec<String>,
}

impl Names {
    /// Reads the text of an `index.json`; `file` names it in errors, `own` is the repository of bare tags.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Unsupported`].
    pub(in crate::registry) fn parse(file: &str, own: &str, text: &[u8]) -> Result<Self> {
        let raw: RawIndex =
            serde_json::from_slice(text).map_err(|error| Error::malformed(file, error.to_string()))?;
        if raw.schema_version.is_some_and(|version| version != 2) {
            return Err(Error::unsupported(file, "its schemaVersion is not 2"));
        }
        if raw.manifests.len() > MANIFESTS_MAX {
            let why = format!("it names more than {MANIFESTS_MAX} manifests");
            return Err(Error::unsupported(file, why));
        }
        let mut names = Self {
            own: own.to_owned(),
            ..Self::default()
        };
        for descriptor in raw.manifests {
            // It would stand in errors and in the log.
            if descriptor.digest.len() > DIGEST_BYTES_MAX {
                let why = format!("one of its digests has {} bytes", descriptor.digest.len());
                return Err(Error::malformed(file, why));
            }
            names.add(descriptor);
        }
        Ok(names)
    }

    fn add(&mut self, raw: RawDescriptor) {
        let media_type = raw.media_type.split(';').next().unwrap_or_default().trim();
        let media_type = (!media_type.is_empty()).then(|| media_type.to_owned());
        let is_image = media_type.as_ref().is_none_or(|media_type| {
            [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX].contains(&media_type.as_str())
        });
        if !is_image || raw.artifact_type.is_some() {
            return;
        }
        let mut annotations = raw.annotations.unwrap_or_default();
        let (ref_name, containerd_name) = (annotations.remove(REF_NAME), annotations.remove(CONTAINERD_NAME));
        let name = self.name_of(ref_name.as_deref(), containerd_name.as_deref(), &raw.digest);
        let number = self.entries.len();
        if let Some((repository, tag)) = name.clone() {
            self.repositories
                .entry(repository)
                .or_default()
                .insert(tag, number);
        } else {
            // It is found by its digest, in the repository of what has no name.
            self.repositories.entry(self.own.clone()).or_default();
        }
        self.entries.push(Entry {
            media_type,
            digest: raw.digest,
            size: raw.size,
            ref_name,
            name,
        });
    }

    /// Repository and tag that the annotations give an image, if they are free: as for skopeo, the first one that has a
    /// name keeps it.
    fn name_of(
        &mut self,
        ref_name: Option<&str>,
        containerd_name: Option<&str>,
        digest: &str,
    ) -> Option<(String, String)> {
        let of_containerd = containerd_name.and_then(of_reference);
        let written = containerd_name.or(ref_name)?;
        let name = of_containerd.or_else(|| {
            let name = ref_name?;
            if is_tag(name) {
                Some((self.own.clone(), name.to_owned()))
            } else {
                of_reference(name)
            }
        });
        let Some((repository, tag)) = name else {
            let written: String = written.chars().take(SHOWN_NAME_CHARS_MAX).collect();
            self.warn(format!(
                "{written:?} is no name that a registry could have: {digest} is found by its digest only"
            ));
            return None;
        };
        let taken = self.repositories.get(&repository).and_then(|tags| tags.get(&tag));
        let earlier = taken.and_then(|number| self.entries.get(*number));
        match earlier.map(|entry| entry.digest == digest) {
            None | Some(true) => Some((repository, tag)),
            Some(false) => {
                self.warn(format!(
                    "{repository}:{tag} is the name of two images: {digest}, the later one, is found by its digest only"
                ));
                None
            }
        }
    }

    fn warn(&mut self, warning: String) {
        if self.warnings.len() < WARNINGS_MAX {
            self.warnings.push(warning);
        }
    }

    /// The repositories, sorted.
    pub(in crate::registry) fn repositories(&self) -> Vec<String> {
        self.repositories.keys().cloned().collect()
    }

    /// The tags of a repository, sorted; `None` if there is no such repository.
    pub(in crate::registry) fn tags(&self, repository: &str) -> Option<Vec<String>> {
        Some(self.repositories.get(repository)?.keys().cloned().collect())
    }

    /// The digests of the images in a repository that have no tag.
    pub(super) fn unnamed(&self, repository: &str) -> Vec<Digest> {
        let unnamed = self.entries.iter().filter(|entry| entry.name.is_none());
        match repository == self.own {
            true => unnamed.filter_map(|entry| entry.digest.parse().ok()).collect(),
            false => Vec::new(),
        }
    }

    /// The image under a tag.
    pub(super) fn tagged(&self, repository: &str, tag: &str) -> Option<&Entry> {
        let number = self.repositories.get(repository)?.get(tag)?;
        self.entries.get(*number)
    }

    /// The image that is meant by what is written behind a layout's path: `REPOSITORY:TAG`, a tag of the layout's own
    /// repository, what [`REF_NAME`] says (as for skopeo and umoci), or a digest.
    ///
    /// # Errors
    /// [`Error::NotFound`] naming what there is; [`Error::Usage`] if several are meant.
    pub(super) fn meant(&self, what: &str, name: &str) -> Result<&Entry> {
        let by_name = match name.rsplit_once(':') {
            Some((repository, tag)) => self.tagged(repository, tag),
            None => self.tagged(&self.own, name),
        };
        if let Some(entry) = by_name {
            return Ok(entry);
        }
        let is_meant = |entry: &&Entry| entry.ref_name.as_deref() == Some(name) || entry.digest == name;
        let meant: Vec<&Entry> = self.entries.iter().filter(is_meant).collect();
        let Some(first) = meant.first() else {
            let why = format!("the layout has {}", self.offered());
            return Err(Error::not_found(what, why));
        };
        if meant.iter().any(|entry| entry.digest != first.digest)
            && meant.iter().any(|entry| entry.name.is_some())
        {
            let why = format!(
                "{what}: it means several images; the layout has {}",
                self.offered()
            );
            return Err(Error::usage(why));
        }
        Ok(first)
    }

    /// The image, if there is but one, whatever the number of its names.
    pub(super) fn only(&self) -> Option<&Entry> {
        let first = self.entries.first()?;
        let is_same = |entry: &Entry| entry.digest == first.digest;
        self.entries.iter().all(is_same).then_some(first)
    }

    /// The repository that an image is asked for in, and its tag, if it has one.
    pub(super) fn place(&self, entry: &Entry) -> (String, Option<String>) {
        match entry.name.clone() {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (self.own.clone(), None),
        }
    }

    /// What there is, for an error.
    fn offered(&self) -> String {
        let name = |(repository, tags): (&String, &BTreeMap<String, usize>)| {
            let full = |tag: &String| format!("{repository}:{tag}");
            tags.keys().map(full).collect::<Vec<_>>()
        };
        let unnamed = self.entries.iter().filter(|entry| entry.name.is_none());
        let digests = unnamed.map(|entry| entry.digest.clone());
        let names: Vec<String> = self.repositories.iter().flat_map(name).chain(digests).collect();
        if names.is_empty() {
            return "no images".to_owned();
        }
        let more = names.len().saturating_sub(SHOWN_NAMES_MAX);
        let shown = names
            .into_iter()
            .take(SHOWN_NAMES_MAX)
            .collect::<Vec<_>>()
            .join(", ");
        match more {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    }
}

/// Repository and tag of a reference, whose host becomes the first component, with `_` for the colon of a port.
fn of_reference(text: &str) -> Option<(String, String)> {
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (text, None),
    };
    let (path, tag) = match name.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
        _ => (name, None),
    };
    let tag = match (tag, digest) {
        (Some(tag), _) => tag,
        (None, None) => DEFAULT_TAG,
        (None, Some(_)) => return None,
    };
    let path = match path.split_once('/') {
        Some((host, rest)) if is_host(host) => {
            format!("{}/{rest}", host.to_ascii_lowercase().replace(':', "_"))
        }
        _ => path.to_owned(),
    };
    // Any layout's host will do: only the path is judged.
    let is_path = Repository::new(&layout_host("/"), &path).is_ok();
    (is_path && is_tag(tag)).then(|| (path, tag.to_owned()))
}

/// The repository of a layout's bare tags and of images without a name: called like the layout's directory.
pub(super) fn own_name(directory: &str) -> String {
    let lower = directory.to_ascii_lowercase();
    let short = lower.get(..OWN_NAME_BYTES_MAX).unwrap_or(&lower);
    if is_component(short) {
        return short.to_owned();
    }
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let words = short
        .split(|c: char| !alphanumeric(c))
        .filter(|word| !word.is_empty());
    let name = words.collect::<Vec<_>>().join("-");
    match is_component(&name) {
        true => name,
        false => "layout".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn digest(number: usize) -> String {
        Digest::of(&[number as u8]).to_string()
    }

    /// Names of images with digests 0, 1, …, each given as ref.name and containerd's name (empty: none).
    fn names(images: &[(&str, &str)]) -> Names {
        let descriptor = |(number, (ref_name, containerd)): (usize, &(&str, &str))| {
            let mut annotations = serde_json::Map::new();
            for (key, value) in [(REF_NAME, ref_name), (CONTAINERD_NAME, containerd)] {
                if !value.is_empty() {
                    annotations.insert(key.to_owned(), json!(value));
                }
            }
            json!({ "mediaType": OCI_MANIFEST, "digest": digest(number), "size": 1, "annotations": annotations })
        };
        let manifests: Vec<_> = images.iter().enumerate().map(descriptor).collect();
        let text = json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
        Names::parse("index.json", "own", text.as_bytes()).unwrap()
    }

    fn all(names: &Names) -> Vec<String> {
        let full = |repository: String| {
            let tags = names.tags(&repository).unwrap();
            tags.into_iter().map(move |tag| format!("{repository}:{tag}"))
        };
        names.repositories().into_iter().flat_map(full).collect()
    }

    #[test]
    fn each_tools_names_become_repository_and_tag() {
        for (ref_name, containerd, expected) in [
            ("v1", "", "own:v1"),
            ("latest", "", "own:latest"),
            ("debian:12", "", "debian:12"),
            ("team/app", "", "team/app:latest"),
            ("docker.io/library/debian:12", "", "docker.io/library/debian:12"),
            ("Quay.io/org/app:1", "", "quay.io/org/app:1"),
            ("localhost:5000/app:1", "", "localhost_5000/app:1"),
            (
                "latest",
                "docker.io/library/app:latest",
                "docker.io/library/app:latest",
            ),
            ("", "ghcr.io/org/app:2", "ghcr.io/org/app:2"),
            ("v1", "Not A Name", "own:v1"),
        ] {
            let names = names(&[(ref_name, containerd)]);
            assert_eq!(all(&names), [expected], "{ref_name} {containerd}");
            assert_eq!(names.warnings, [""; 0]);
            assert!(names.unnamed("own").is_empty());
        }
        let of_digest = format!("app:1@{}", digest(0));
        assert_eq!(all(&names(&[(&of_digest, "")])), ["app:1"]);
    }

    #[test]
    fn what_cannot_be_a_name_is_found_by_digest() {
        for bad in [
            "a b", "UP/x:1", "../etc:1", "/abs:1", "x:", "-x", "a//b:1", "\u{e4}:1", ".hidden",
        ] {
            let names = names(&[(bad, "")]);
            assert_eq!(all(&names), [""; 0], "{bad}");
            assert_eq!(names.warnings.len(), 1, "{bad}");
            assert_eq!(names.unnamed("own"), [Digest::of(&[0])], "{bad}");
            assert_eq!(
                names.meant("x", bad).unwrap().digest,
                digest(0),
                "as it is written"
            );
            assert_eq!(names.meant("x", &digest(0)).unwrap().digest, digest(0));
        }
    }

    #[test]
    fn the_first_of_two_keeps_the_name_as_for_skopeo() {
        let names = names(&[("x", ""), ("x", ""), ("own:x", ""), ("y", "")]);
        assert_eq!(all(&names), ["own:x", "own:y"]);
        assert_eq!(names.tagged("own", "x").unwrap().digest, digest(0));
        assert_eq!(names.meant("w", "x").unwrap().digest, digest(0));
        assert_eq!(names.unnamed("own"), [Digest::of(&[1]), Digest::of(&[2])]);
        assert_eq!(names.warnings.len(), 2);
        assert_eq!(names.only(), None);
    }

    #[test]
    fn a_tag_that_two_containerd_images_have_is_refused_with_their_names() {
        let names = names(&[("1", "a.io/x:1"), ("1", "a.io/y:1")]);
        let error = names.meant("oci:/l:1", "1").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("a.io/x:1, a.io/y:1"), "{error}");
        assert_eq!(names.meant("w", "a.io/y:1").unwrap().digest, digest(1));
    }

    #[test]
    fn only_images_count_and_one_image_may_have_two_names() {
        let text = json!({ "manifests": [
            { "mediaType": OCI_MANIFEST, "digest": digest(0), "size": 1, "annotations": { REF_NAME: "a" } },
            { "mediaType": OCI_MANIFEST, "digest": digest(0), "size": 1, "annotations": { REF_NAME: "b" } },
            { "mediaType": OCI_MANIFEST, "digest": digest(1), "size": 1, "artifactType": "x/y" },
            { "mediaType": "application/x", "digest": digest(2), "size": 1 },
        ] });
        let names = Names::parse("f", "own", text.to_string().as_bytes()).unwrap();
        assert_eq!(names.only().unwrap().digest, digest(0));
        assert_eq!(all(&names), ["own:a", "own:b"]);
    }

    #[test]
    fn digests_of_other_algorithms_are_refused_when_they_are_needed() {
        let text = json!({ "manifests": [
            { "mediaType": OCI_MANIFEST, "digest": "sha512:00", "size": 1, "annotations": { REF_NAME: "a" } },
            { "digest": "sha256:../x", "size": 1, "annotations": { REF_NAME: "b" } },
        ] });
        let names = Names::parse("f", "own", text.to_string().as_bytes()).unwrap();
        let failure = |tag: &str| names.tagged("own", tag).unwrap().digest("what").unwrap_err();
        assert!(matches!(failure("a"), Error::Unsupported { why, .. } if why.contains("sha512")));
        assert!(matches!(failure("b"), Error::Malformed { .. }));
    }

    #[test]
    fn what_is_written_at_length_fills_neither_an_error_nor_the_log() {
        let long = "\u{1}".repeat(1 << 20);
        let names = names(&[(&long, ""), ("a", "")]);
        assert!(names.warnings.iter().all(|warning| warning.len() < 2000));
        assert!(names.meant("x", "b").unwrap_err().to_string().len() < 500);
        assert_eq!(names.meant("x", &long).unwrap().digest, digest(0));
        let text = json!({ "manifests": [{ "digest": long, "size": 1 }] }).to_string();
        let error = Names::parse("/l/index.json", "own", text.as_bytes()).unwrap_err();
        assert_eq!(error.exit_code(), 7);
        assert!(error.to_string().len() < 500);
    }

    #[test]
    fn what_is_no_index_is_refused() {
        for (text, code) in [
            ("", 7),
            ("[]", 7),
            (r#"{"schemaVersion":1,"manifests":[]}"#, 1),
            (r#"{"manifests":[{"size":1}]}"#, 7),
            (r#"{"manifests":[{"digest":"sha256:0","size":-1}]}"#, 7),
        ] {
            let error = Names::parse("/l/index.json", "own", text.as_bytes()).unwrap_err();
            assert_eq!(error.exit_code(), code, "{text}");
            assert!(error.to_string().starts_with("/l/index.json"), "{error}");
        }
        let many = vec![json!({ "digest": "d", "size": 1 }); MANIFESTS_MAX + 1];
        let text = json!({ "manifests": many }).to_string();
        assert!(Names::parse("f", "own", text.as_bytes()).is_err());
    }

    #[test]
    fn directories_give_their_name() {
        for (directory, expected) in [
            ("images", "images"),
            ("my_app.v2", "my_app.v2"),
            ("My App!", "my-app"),
            ("..", "layout"),
            ("", "layout"),
            ("\u{e4}\u{f6}", "layout"),
        ] {
            assert_eq!(own_name(directory), expected, "{directory}");
        }
    }

    proptest! {
        /// Whatever is written: every image is found, by a name that a reference can have, or by its digest.
        #[test]
        fn every_image_is_found_and_no_name_breaks_the_grammar(
            written in prop::collection::vec(("[a-cA./:@_ -]{0,8}", "([a-c]{1,2}[./:]){0,3}[a-c]?"), 0..6),
        ) {
            let images: Vec<(&str, &str)> = written.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
            let names = names(&images);
            for repository in names.repositories() {
                prop_assert!(Repository::new(&layout_host("/l"), &repository).is_ok());
                for tag in names.tags(&repository).unwrap() {
                    prop_assert!(is_tag(&tag));
                }
            }
            for number in 0..images.len() {
                let number_of = |entry: &Entry| entry.digest == digest(number);
                let by_tag = names.repositories().iter().any(|repository| {
                    let tags = names.tags(repository).unwrap();
                    tags.iter().any(|tag| number_of(names.tagged(repository, tag).unwrap()))
                });
                prop_assert!(by_tag || names.unnamed("own").contains(&Digest::of(&[number as u8])));
                prop_assert!(number_of(names.meant("x", &digest(number)).unwrap()));
            }
        }

        #[test]
        fn any_text_is_an_index_or_an_error(text in "\\PC{0,80}", directory in "\\PC{0,200}") {
            let _ = Names::parse("f", "own", text.as_bytes());
            prop_assert!(is_component(&own_name(&directory)));
        }
    }
}
