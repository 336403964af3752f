//! The merge against a model of it: a map from paths to inodes, the rules written down as plainly as they can be. Few
//! names make collisions, whiteouts and links of each other likely.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

type Path = Vec<Vec<u8>>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inode {
    kind: Kind,
    layer: usize,
    entry: Option<usize>,
    link: Vec<u8>,
}

#[derive(Debug, Default)]
struct Model {
    names: BTreeMap<Path, usize>,
    inodes: Vec<Inode>,
}

/// A walk that does not arrive: symlinks without end, or a file in the way.
struct Lost;

fn components(path: &[u8]) -> Path {
    path.split(|&byte| byte == b'/').map(<[u8]>::to_vec).collect()
}

fn cleaned(path: &[u8]) -> Path {
    let clean = crate::layer::entry::clean_path(path).path;
    let path = components(&clean);
    if clean.is_empty() { Vec::new() } else { path }
}

impl Model {
    fn new() -> Self {
        let mut model = Self::default();
        model.put(Vec::new(), Kind::Dir, 0, None, b"");
        model
    }

    fn put(&mut self, path: Path, kind: Kind, layer: usize, entry: Option<usize>, link: &[u8]) -> usize {
        self.remove(&path);
        let link = link.to_vec();
        self.inodes.push(Inode {
            kind,
            layer,
            entry,
            link,
        });
        self.names.insert(path, self.inodes.len() - 1);
        self.inodes.len() - 1
    }

    fn remove(&mut self, path: &[Vec<u8>]) {
        self.names.retain(|name, _| !name.starts_with(path));
    }

    fn at(&self, path: &[Vec<u8>]) -> Option<&Inode> {
        self.names.get(path).map(|&inode| &self.inodes[inode])
    }

    /// Walks `path`, replacing each symlink that `follows` says by its target. Calls `enter` for every other name.
    fn walk(
        &mut self,
        path: &[Vec<u8>],
        follows: impl Fn(&Inode) -> bool,
        mut enter: impl FnMut(&mut Self, &Path) -> Result<(), Lost>,
    ) -> Result<Path, Lost> {
        let (mut at, mut links) = (Path::new(), 0);
        let mut rest: Path = path.to_vec();
        while !rest.is_empty() {
            let name = rest.remove(0);
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    at.pop();
                    continue;
                }
                _ => at.push(name),
            }
            match self.at(&at).cloned() {
                Some(inode) if inode.kind == Kind::Symlink && follows(&inode) => {
                    links += 1;
                    if links > 40 {
                        return Err(Lost);
                    }
                    at.pop();
                    if inode.link.starts_with(b"/") {
                        at.clear();
                    }
                    rest.splice(0..0, components(&inode.link));
                }
                _ => enter(self, &at)?,
            }
        }
        Ok(at)
    }

    fn add(&mut self, layer: usize, entries: &[Entry]) {
        let mut links = Vec::new();
        for (number, entry) in entries.iter().enumerate() {
            let path = cleaned(&entry.path);
            let Some((name, parent)) = path.split_last() else {
                if entry.kind == Kind::Dir {
                    let root = self.names[&Path::new()];
                    (self.inodes[root].layer, self.inodes[root].entry) = (layer, Some(number));
                }
                continue;
            };
            if path.iter().any(|name| name.starts_with(b".wh.")) {
                continue;
            }
            let parent = self.walk(
                parent,
                |inode| inode.layer == layer,
                |model, at| {
                    if model.at(at).map(|inode| inode.kind) != Some(Kind::Dir) {
                        model.put(at.clone(), Kind::Dir, layer, None, b"");
                    }
                    Ok(())
                },
            );
            let Ok(mut path) = parent else { continue };
            path.push(name.clone());
            let both_dirs =
                entry.kind == Kind::Dir && self.at(&path).is_some_and(|inode| inode.kind == Kind::Dir);
            if both_dirs {
                let inode = self.names[&path];
                (self.inodes[inode].layer, self.inodes[inode].entry) = (layer, Some(number));
            } else {
                let inode = self.put(path, entry.kind, layer, Some(number), &entry.link);
                links.extend((entry.kind == Kind::Hardlink).then_some(inode));
            }
        }
        for link in links {
            self.bind(link);
        }
    }

    /// Follows a hard link over others to something else, and binds all of them to it.
    fn bind(&mut self, link: usize) {
        let (mut seen, mut inode) = (Vec::new(), Some(link));
        while let Some(at) = inode.filter(|&at| self.inodes[at].kind == Kind::Hardlink && !seen.contains(&at))
        {
            seen.push(at);
            let mut path = cleaned(&self.inodes[at].link.clone());
            let name = path.pop();
            let enter = |model: &mut Self, at: &Path| match model.at(at) {
                Some(inode) if inode.kind == Kind::Dir => Ok(()),
                _ => Err(Lost),
            };
            inode = match (self.walk(&path, |_| true, enter), name) {
                (Ok(mut path), Some(name)) => {
                    path.push(name);
                    self.names.get(&path).copied()
                }
                _ => None,
            };
        }
        let bound = inode.filter(|&at| !matches!(self.inodes[at].kind, Kind::Hardlink | Kind::Dir));
        for at in seen {
            let names = self.names.iter().find(|&(_, &inode)| inode == at);
            if let Some(path) = names.map(|(path, _)| path.clone()) {
                match bound {
                    Some(bound) => drop(self.names.insert(path, bound)),
                    None => self.remove(&path),
                }
            }
        }
    }

    fn hide(&mut self, layer: usize, entries: &[Entry]) {
        let mut alone = Self::new();
        alone.add(layer, entries);
        for entry in entries {
            let path = cleaned(&entry.path);
            let Some((name, parent)) = path.split_last() else {
                continue;
            };
            let Some(hidden) = name.strip_prefix(b".wh.") else {
                continue;
            };
            if parent.iter().any(|name| name.starts_with(b".wh.")) || hidden.is_empty() {
                continue;
            }
            let Ok(mut dir) = alone.walk(parent, |_| true, |_, _| Ok(())) else {
                continue;
            };
            if hidden == b".wh..opq" {
                self.names
                    .retain(|name, _| !(name.starts_with(&dir) && name.len() > dir.len()));
            } else {
                dir.push(hidden.to_vec());
                self.remove(&dir);
            }
        }
    }
}

/// A name as the tests compare it: path, type, source, inode number, link count, target.
type Line = (Path, Kind, usize, Option<usize>, usize, usize, Vec<u8>);

fn model_lines(layers: &[Vec<Entry>]) -> Vec<Line> {
    let mut model = Model::new();
    for (number, entries) in layers.iter().enumerate() {
        model.hide(number, entries);
        model.add(number, entries);
    }
    let mut numbers = Vec::new();
    let mut lines = Vec::new();
    for (path, &inode) in &model.names {
        if !numbers.contains(&inode) {
            numbers.push(inode);
        }
        let number = numbers.iter().position(|&seen| seen == inode).unwrap();
        let Inode {
            kind,
            layer,
            entry,
            link,
        } = model.inodes[inode].clone();
        let nlink = if kind == Kind::Dir {
            let is_subdir = |(name, &inode): (&Path, &usize)| {
                name.len() == path.len() + 1
                    && name.starts_with(path)
                    && model.inodes[inode].kind == Kind::Dir
            };
            2 + model.names.iter().filter(|&name| is_subdir(name)).count()
        } else {
            model.names.values().filter(|&&other| other == inode).count()
        };
        lines.push((path.clone(), kind, layer, entry, number, nlink, link));
    }
    lines
}

fn tree_lines(tree: &Tree<Vec<u8>>) -> Vec<Line> {
    let mut lines = Vec::new();
    walk(tree, &mut |path, node| {
        lines.push((
            cleaned(path),
            node.kind,
            usize::from(node.layer),
            node.entry.map(|entry| entry as usize),
            node.number as usize,
            node.nlink as usize,
            tree.link(node).unwrap().to_vec(),
        ));
        assert_eq!(tree.resolve(path, false).unwrap(), node.number);
        let first = tree.path_of(node.number).unwrap();
        assert_eq!(tree.resolve(&first, false).unwrap(), node.number);
        assert!(first <= path.to_vec() || !node.is_dir());
    });
    lines
}

fn name() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "b", "c"])
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(name(), 1..4).prop_map(|names| names.join("/"))
}

fn target() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["a", "b", "c", "..", "."]);
    let parts = prop::collection::vec(part, 1..4);
    (any::<bool>(), parts).prop_map(|(absolute, parts)| {
        let root = if absolute { "/" } else { "" };
        format!("{root}{}", parts.join("/"))
    })
}

fn entry() -> impl Strategy<Value = Entry> {
    let linked = |path: String, kind, link: String| Entry {
        link: link.into(),
        ..Entry::new(path, kind)
    };
    let marked = |path: String, marker: fn(&str) -> String| {
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", &path));
        Entry::new(format!("{parent}/{}", marker(name)), Kind::File)
    };
    prop_oneof![
        4 => path().prop_map(|path| Entry::new(path, Kind::File)),
        3 => path().prop_map(|path| Entry::new(path, Kind::Dir)),
        3 => (path(), target()).prop_map(move |(path, link)| linked(path, Kind::Symlink, link)),
        3 => (path(), path()).prop_map(move |(path, link)| linked(path, Kind::Hardlink, link)),
        3 => path().prop_map(move |path| marked(path, |name| format!(".wh.{name}"))),
        1 => path().prop_map(move |path| marked(path, |_| ".wh..wh..opq".to_owned())),
        1 => Just(Entry::new("./", Kind::Dir)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_merged_tree_is_what_the_rules_say(
        layers in prop::collection::vec(prop::collection::vec(entry(), 0..10), 1..4)
    ) {
        let indexes: Vec<_> = layers.iter().map(|entries| layer(entries)).collect();
        let (tree, _) = merged(&indexes, Whiteouts::Apply);
        let (again, _) = merged(&indexes, Whiteouts::Apply);
        prop_assert_eq!(tree_lines(&tree), model_lines(&layers));
        prop_assert_eq!(tree_lines(&tree), tree_lines(&again));
        prop_assert_eq!(tree.totals().nodes, u64::from(tree.node_count()));
    }
}
