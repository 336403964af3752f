//! The content of the demo registry: more than 50 repositories with several tags each, made up but shaped like real
//! ones, the same each time.
//!
//! Layers are shared as in a real registry: a few bases and runtimes below many small applications, so that all of it
//! is made in a moment.

use crate::error::Result;
use crate::layer::estargz::writer::Options;

use super::content::Content;
use super::formats::add_formats;
use super::images::{Image, ImageBuilder, ImageIndex, Layer, Schema};
use super::tree;

/// The repository with very many tags.
const MANY_TAGS_REPOSITORY: &str = "ci/nightly";
/// How many it has, besides the ordinary ones.
const MANY_TAGS: usize = 5000;
/// Small, so that files of a few hundred KB have several chunks.
const CHUNK_BYTES: u64 = 64 << 10;
/// Fast rather than small: all of it is compressed at each start.
const LEVEL: u32 = 1;
const ARCHITECTURES: [&str; 2] = ["amd64", "arm64"];
const RELEASES: [u32; 2] = [11, 12];
const BASES: [&str; 4] = ["base/slim", "base/standard", "base/tiny", "tiny"];
const LANGUAGES: [&str; 6] = [
    "go-like",
    "jvm-like",
    "node-like",
    "perl-like",
    "python-like",
    "ruby-like",
];
const VERSIONS: [&str; 3] = ["1.0", "1.1", "2.0"];
const TEAMS: [&str; 6] = ["billing", "identity", "media", "search", "shipping", "web"];
const PARTS: [&str; 5] = ["api", "frontend", "jobs", "migrations", "worker"];
const OTHERS: [&str; 14] = [
    "db/keyvalue",
    "db/relational",
    "db/timeseries",
    "monitor/collector",
    "queue/broker",
    "tools/build/compiler",
    "tools/build/linker",
    "tools/cli/format",
    "tools/cli/lint",
    "tools/debug/shell",
    "tools/debug/tracer",
    "web/cache",
    "web/proxy",
    "web/server",
];

/// The layers that many images share, by architecture.
struct Shared {
    architecture: &'static str,
    /// In the order of [`RELEASES`].
    bases: Vec<Layer>,
    /// In the order of [`LANGUAGES`].
    runtimes: Vec<Layer>,
}

fn options() -> Options {
    Options {
        chunk_bytes: CHUNK_BYTES,
        level: LEVEL,
        ..Options::default()
    }
}

impl Shared {
    fn make(architecture: &'static str) -> Result<Self> {
        let base = |release| Layer::estargz(&tree::base(release, architecture), options());
        let runtime = |language| Layer::estargz(&tree::runtime(language, architecture), options());
        Ok(Self {
            architecture,
            bases: RELEASES.into_iter().map(base).collect::<Result<_>>()?,
            runtimes: LANGUAGES.into_iter().map(runtime).collect::<Result<_>>()?,
        })
    }

    /// An image of base `base`, runtime `runtime` if any, and `layers` on top.
    fn image(&self, base: usize, runtime: Option<usize>, layers: Vec<Layer>, schema: Schema) -> Image {
        let below = self.bases.get(base).into_iter();
        let below = below.chain(runtime.and_then(|runtime| self.runtimes.get(runtime)));
        let mut builder = ImageBuilder::new(below.cloned().chain(layers).collect());
        builder.schema = schema;
        builder.config = serde_json::json!({
            "Env": ["PATH=/usr/bin"],
            "Cmd": ["/bin/sh"],
            "Labels": { "org.opencontainers.image.vendor": "Demo" },
        });
        builder.architecture(self.architecture).build()
    }
}

/// Makes all of it.
///
/// # Errors
/// Whatever the writer of the layers finds wrong with the made-up trees.
pub fn sample_content() -> Result<Content> {
    let shared = std::thread::scope(|scope| {
        let makers = ARCHITECTURES.map(|architecture| scope.spawn(move || Shared::make(architecture)));
        let made = makers.into_iter().map(|maker| match maker.join() {
            Ok(shared) => shared,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        made.collect::<Result<Vec<_>>>()
    })?;
    let mut content = Content::new();
    for name in BASES {
        for (number, release) in RELEASES.into_iter().enumerate() {
            let images = shared
                .iter()
                .map(|shared| shared.image(number, None, Vec::new(), Schema::Oci));
            let digest = content.add_index(name, &ImageIndex::new(images.collect()));
            for tag in [
                release.to_string(),
                format!("{release}-stable"),
                "latest".to_owned(),
            ] {
                content.tag(name, tag, digest);
            }
        }
    }
    let teams = TEAMS
        .iter()
        .flat_map(|team| PARTS.iter().map(move |part| format!("team/{team}/{part}")));
    let languages = LANGUAGES.iter().map(|language| format!("lang/{language}"));
    let others = OTHERS.iter().map(|name| (*name).to_owned());
    let names = languages.chain(teams).chain(others);
    for (number, name) in names.chain([MANY_TAGS_REPOSITORY.to_owned()]).enumerate() {
        add_application(&mut content, &shared, &name, number % LANGUAGES.len())?;
    }
    add_many_tags(&mut content);
    add_formats(&mut content)?;
    Ok(content)
}

/// A repository with a tag for each of [`VERSIONS`], one for each major version, and `latest`.
fn add_application(content: &mut Content, shared: &[Shared], name: &str, runtime: usize) -> Result<()> {
    // A registry in the field has all of these: indexes and single manifests, of OCI and of Docker.
    let schema = if name.starts_with("web/") {
        Schema::Docker
    } else {
        Schema::Oci
    };
    let single = name.starts_with("tools/");
    for (number, version) in VERSIONS.into_iter().enumerate() {
        let application = tree::application(name, number as u32, version);
        let mut layers = vec![Layer::estargz(&tree::plugins(name, false), options())?];
        if number == VERSIONS.len() - 1 {
            layers.push(Layer::estargz(&tree::plugins(name, true), options())?);
        }
        layers.push(Layer::estargz(&application, options())?);
        let base = usize::from(number > 0);
        let mut images: Vec<Image> = shared
            .iter()
            .map(|shared| shared.image(base, Some(runtime), layers.clone(), schema))
            .collect();
        images.truncate(if single { 1 } else { images.len() });
        let digest = match images.as_slice() {
            [image] => content.add_image(name, image),
            _ => content.add_index(name, &ImageIndex::new(images)),
        };
        let major = version.split('.').next().unwrap_or(version);
        for tag in [version, major, "latest"] {
            content.tag(name, tag, digest);
        }
    }
    Ok(())
}

fn add_many_tags(content: &mut Content) {
    let digests: Vec<_> = content
        .repository(MANY_TAGS_REPOSITORY)
        .into_iter()
        .flat_map(|repository| repository.tags().map(|(_, digest)| digest).collect::<Vec<_>>())
        .collect();
    for (number, digest) in (1..=MANY_TAGS).zip(digests.iter().cycle()) {
        content.tag(MANY_TAGS_REPOSITORY, format!("build-{number:05}"), *digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_content_is_as_large_as_promised_and_the_same_each_time() {
        let content = sample_content().unwrap();
        let names: Vec<_> = content.names().collect();
        assert!(names.len() > 50, "{}", names.len());
        let tags = |name: &str| content.repository(name).unwrap().tags().count();
        assert!(names.iter().all(|name| tags(name) >= 3));
        assert!(tags(MANY_TAGS_REPOSITORY) > MANY_TAGS);
        let again = sample_content().unwrap();
        let digest = |content: &Content| content.repository("team/search/api")?.resolve("latest");
        assert!(digest(&content).is_some());
        assert_eq!(digest(&content), digest(&again));
    }
}
