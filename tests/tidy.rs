//! What a reader of the code relies on and no compiler checks: the direction of imports, the size of files, where `unsafe`
//! and fuser may stand, and that the documents name what there is.
//!
//! The checks read text, not syntax. That is enough because code is formatted: an import is a line, a comment begins one.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folders of `src`, each with the ones it may import from besides itself: those after it.
const LAYERS: [&str; 15] = [
    "cli", "get", "convert", "daemon", "kernel", "fuse", "fs", "image", "fetch", "store", "registry",
    "layer", "config", "digest", "error",
];
/// What `demo`, which stands beside the layers, may import. Only the command imports it.
const OF_DEMO: [&str; 5] = ["demo", "layer", "registry::reference", "digest", "error"];
/// The only files with `unsafe`. Each says at every use why it is sound.
const WITH_UNSAFE: [&str; 11] = [
    "src/daemon/memory.rs",
    "src/fuse/erofs_uuid.rs",
    "src/fuse/fd_passing.rs",
    "src/fuse/mount_attr.rs",
    "src/layer/gzip/zlib.rs",
    "src/store/chunk_map.rs",
    "src/store/digests/table.rs",
    "src/store/layer.rs",
    "src/store/mapped.rs",
    "src/store/sigbus.rs",
    "tests/fuzz/counting.rs",
];
/// Files have fewer lines than this.
const LINES_MAX: usize = 600;
/// The documents for readers of the repository.
const DOCUMENTS: [&str; 4] = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md"];

/// A source file: its path from the root of the repository, and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Lines that are code, with their numbers from 1.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let numbered = self.text.lines().enumerate();
        numbered
            .map(|(index, line)| (index + 1, line))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    /// The layer that a file of `src` belongs to.
    fn layer(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let name = inside.split('/').next()?;
        Some(name.strip_suffix(".rs").unwrap_or(name))
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn document(name: &str) -> String {
    read(&root().join(name))
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    for dir in ["src", "tests", "examples"] {
        files_below(&root().join(dir), &mut paths);
    }
    paths.sort();
    let source = |path: PathBuf| Source {
        path: path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned(),
        text: read(&path),
    };
    let sources: Vec<Source> = paths.into_iter().map(source).collect();
    assert!(sources.len() > 100, "the sources were not found");
    sources
}

/// Fails with all violations at once.
fn none(violations: &[String]) {
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

/// The paths behind `crate::` in a line, without their last part if that is cut off by a brace.
fn crate_paths(line: &str) -> impl Iterator<Item = &str> {
    let is_path = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    line.match_indices("crate::").map(move |(start, marker)| {
        let rest = &line[start + marker.len()..];
        let end = rest.find(|c: char| !is_path(c)).unwrap_or(rest.len());
        rest[..end].trim_end_matches(':')
    })
}

fn names(text: &str, word: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    text.match_indices(word).any(|(start, found)| {
        let before = text[..start].chars().next_back();
        let after = text[start + found.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

#[test]
fn imports_go_only_downwards() {
    let rank = |layer: &str| LAYERS.iter().position(|known| *known == layer);
    let may_import = |from: &str, path: &str| {
        let to = path.split("::").next().unwrap_or_default();
        match (from, to) {
            ("demo", _) => OF_DEMO
                .iter()
                .any(|allowed| path == *allowed || path.starts_with(&format!("{allowed}::"))),
            ("cli", "demo") => true,
            _ => rank(to) >= rank(from) && rank(to).is_some(),
        }
    };
    let mut violations = Vec::new();
    for source in sources() {
        let Some(layer) = source.layer().filter(|layer| !matches!(*layer, "lib" | "main")) else {
            continue;
        };
        if layer != "demo" && rank(layer).is_none() {
            violations.push(format!("{}: a folder that no rule knows", source.path));
        }
        for (number, line) in source.code() {
            for path in crate_paths(line).filter(|path| !may_import(layer, path)) {
                violations.push(format!("{}:{number}: {layer} imports {path}", source.path));
            }
        }
    }
    none(&violations);
}

#[test]
fn fuser_is_known_to_its_adapter_alone() {
    let mut violations = Vec::new();
    for source in sources().iter().filter(|source| source.path.starts_with("src/")) {
        if source.layer() == Some("fuse") {
            continue;
        }
        let lines = source.code().filter(|(_, line)| names(line, "fuser"));
        violations.extend(lines.map(|(number, _)| format!("{}:{number}: names fuser", source.path)));
    }
    none(&violations);
}

#[test]
fn unsafe_stands_in_a_few_known_files() {
    let mut with_unsafe = BTreeSet::new();
    for source in sources() {
        let is_unsafe = |line: &str| names(line, "unsafe") || names(line, "allow(unsafe_code)");
        if source.path != "tests/tidy.rs" && source.code().any(|(_, line)| is_unsafe(line)) {
            with_unsafe.insert(source.path);
        }
    }
    let known: BTreeSet<String> = WITH_UNSAFE.iter().map(ToString::to_string).collect();
    assert_eq!(with_unsafe, known);
}

#[test]
fn files_are_short_and_say_what_they_own() {
    let mut violations = Vec::new();
    for Source { path, text } in sources() {
        let lines = text.lines().count();
        if lines >= LINES_MAX {
            violations.push(format!("{path}: {lines} lines, {LINES_MAX} are too many"));
        }
        if !text.starts_with("//!") {
            violations.push(format!("{path}: does not begin with what it owns"));
        }
    }
    none(&violations);
}

#[test]
fn nothing_is_left_over() {
    // Put together here, so that this file is clean too.
    let leftovers = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("X", "XX"),
        concat!("db", "g!"),
    ];
    let mut violations = Vec::new();
    for Source { path, text } in sources() {
        for (index, line) in text.lines().enumerate() {
            let found = leftovers.iter().filter(|leftover| names(line, leftover));
            violations.extend(found.map(|leftover| format!("{path}:{}: {leftover}", index + 1)));
        }
    }
    none(&violations);
}

/// The words of `text` that `keep` finds, split at what cannot be in a path.
fn words<'a>(text: &'a str, keep: impl Fn(&str) -> bool + 'a) -> impl Iterator<Item = &'a str> {
    let is_path = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    text.split(move |c: char| !is_path(c))
        .map(|word| word.trim_end_matches('.'))
        .filter(move |word| keep(word))
}

#[test]
fn documents_that_are_referred_to_are_here() {
    let mut violations = Vec::new();
    for Source { path, text } in sources() {
        let known = |word: &str| DOCUMENTS.contains(&word);
        let unknown = words(&text, |word| word.ends_with(".md") && word != ".md").filter(|word| !known(word));
        violations.extend(unknown.map(|word| format!("{path}: refers to {word}, which is not here")));
    }
    none(&violations);
}

#[test]
fn the_map_names_folders_and_files_that_exist() {
    let map = document("ARCHITECTURE.md");
    let section = map.split("## Code map").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let unnamed: Vec<&&str> = LAYERS
        .iter()
        .chain(&["demo"])
        .filter(|layer| !names(section, layer))
        .collect();
    assert!(unnamed.is_empty(), "the map does not name {unnamed:?}");
    let exists = |path: &str| root().join("src").join(path).exists() || root().join(path).exists();
    let missing: Vec<String> = words(&map, |word| word.ends_with(".rs") && word.contains('/'))
        .filter(|path| !exists(path))
        .map(|path| format!("ARCHITECTURE.md names {path}, which is not there"))
        .collect();
    none(&missing);
}

/// What `registryfs --help` prints.
fn help() -> String {
    let program = env!("CARGO_BIN_EXE_registryfs");
    let output = Command::new(program).arg("--help").output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_readme_names_every_command_and_global_option() {
    let (readme, help) = (document("README.md"), help());
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.contains(&"mount"), "{help}");
    let options: Vec<&str> = help
        .split_whitespace()
        .filter(|word| word.starts_with("--"))
        .map(|word| word.trim_end_matches(','))
        .filter(|option| !matches!(*option, "--help" | "--version"))
        .collect();
    assert!(options.contains(&"--cache-dir"), "{help}");
    let commands = commands
        .iter()
        .filter(|command| !readme.contains(&format!("**`{command}")));
    let options = options.iter().filter(|option| !names(&readme, option));
    let missing: Vec<String> = commands
        .chain(options)
        .map(|missing| format!("README.md does not describe {missing}"))
        .collect();
    none(&missing);
}

#[test]
fn the_readme_names_every_setting() {
    let readme = document("README.md");
    let keys = read(&root().join("src/config/layer.rs"));
    let keys: Vec<&str> = keys
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("pub ")?.split_once(": "))
        .map(|(key, _)| key)
        .filter(|key| !key.contains(['(', ' ']))
        .collect();
    assert!(keys.contains(&"tag_ttl_s"), "{keys:?}");
    let environment = read(&root().join("src/config/environment.rs"));
    let variables: Vec<&str> = environment
        .split('"')
        .filter(|text| text.starts_with("REGISTRYFS_") && !text.contains(' '))
        .collect();
    assert!(variables.contains(&"REGISTRYFS_TAG_TTL"), "{variables:?}");
    let missing: Vec<String> = keys
        .iter()
        .chain(&variables)
        .filter(|setting| !names(&readme, setting))
        .map(|setting| format!("README.md does not describe {setting}"))
        .collect();
    none(&missing);
}
