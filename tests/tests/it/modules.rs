//! Modules inside a crate import one way, as the arrows between crates do. The layers here are those of ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The modules of a crate in layers, the lowest first. A module may import modules of lower layers, and none of its own layer or
/// above. A module that is named here and does not exist is no mistake; one that exists and is not named is.
struct Layers {
    folder: &'static str,
    layers: &'static [&'static [&'static str]],
    /// Arrows upwards that are still there: from, to.
    exceptions: &'static [(&'static str, &'static str)],
}

const TIERS: Layers = Layers {
    folder: "tiers/src",
    layers: &[
        &["caps", "clock", "claim", "distinct", "meter", "tier"],
        &["admission", "changes", "eviction"],
        &["layout", "pool", "simulate"],
        &["readable", "sampled", "slots"],
        &["host"],
        &["block"],
        &["below"],
        &["stack"],
        &["nvme"],
        &["object"],
    ],
    exceptions: &[],
};

const KVSTORE: Layers = Layers {
    folder: "kvstore/src",
    layers: &[
        &["advise", "caps", "clock", "random", "telemetry"],
        &["calls", "config", "copy_rate", "data_calls", "describing", "prefetches", "prewarms", "trace"],
        &["accesses", "authority", "caller", "connections", "descriptors", "log", "open", "sources"],
        &["daemon"],
        &["status", "tick", "wire"],
        &["verbs"],
        &["http", "local", "publisher", "service"],
        &["listeners"],
        &["serve"],
        &["replay"],
        &["cli"],
    ],
    exceptions: &[],
};

const ROUTER_SERVE: Layers = Layers {
    folder: "router/src/serve",
    layers: &[
        &["connections", "json", "listen", "shapes"],
        &["answers", "openai", "sse"],
        &["body", "upstream"],
        &["app"],
        &["metrics", "models", "resume"],
        &["ahead", "known", "verify"],
        &["call", "indexer"],
        &["whole"],
        &["pass", "relay"],
        &["proxy"],
    ],
    exceptions: &[],
};

impl Layers {
    fn layer_of(&self, module: &str) -> Option<usize> {
        self.layers.iter().position(|layer| layer.contains(&module))
    }

    fn modules(&self) -> BTreeSet<&'static str> {
        self.layers.iter().flat_map(|layer| layer.iter().copied()).collect()
    }

    /// Whether one module may import the other.
    fn allows(&self, from: &str, to: &str) -> bool {
        let lower = self.layer_of(to).zip(self.layer_of(from)).is_some_and(|(to, from)| to < from);
        lower || self.exceptions.contains(&(from, to))
    }

    /// Every arrow that is not allowed, as the file, and the module that it imports.
    fn wrong_arrows(&self, files: &BTreeMap<PathBuf, String>) -> Vec<(PathBuf, String)> {
        let known = self.modules();
        let mut wrong = Vec::new();
        for (path, text) in files {
            let Some(module) = module_of(path) else { continue };
            for imported in imports(path, text, &known) {
                if imported != module && !self.allows(&module, &imported) {
                    wrong.push((path.clone(), imported));
                }
            }
        }
        wrong
    }
}

/// The module at the top of the folder that a file is part of. None for the root.
fn module_of(path: &Path) -> Option<String> {
    let first = path.components().next()?.as_os_str().to_str()?;
    let name = first.strip_suffix(".rs").unwrap_or(first);
    (!["lib", "main", "mod"].contains(&name)).then(|| name.to_owned())
}

/// How often `super::` is said in a file to name the root of the crate.
fn depth_of(path: &Path) -> usize {
    let folders = path.components().count() - 1;
    let is_root_of_folder = path.file_name().is_some_and(|name| name == "mod.rs");
    folders + 1 - usize::from(is_root_of_folder)
}

/// The text without its comments, and without the unit tests at its end.
fn code_of(text: &str) -> String {
    let before_tests = text.find("#[cfg(test)]\nmod tests {").map_or(text, |at| &text[..at]);
    before_tests.lines().map(|line| line.split("//").next().unwrap_or("")).flat_map(|line| [line, "\n"]).collect()
}

/// The modules at the top of the crate that a file names, by `crate::` or by `super::`.
fn imports(path: &Path, text: &str, known: &BTreeSet<&str>) -> BTreeSet<String> {
    let code = code_of(text);
    let root = "super::".repeat(depth_of(path));
    let mut found = BTreeSet::new();
    for prefix in ["crate::", root.as_str()] {
        for (at, _) in code.match_indices(prefix) {
            let is_whole = !code[..at].ends_with(|before: char| before.is_alphanumeric() || "_:$".contains(before));
            if is_whole {
                found.extend(names(&code[at + prefix.len()..]).filter(|name| known.contains(name)).map(str::to_owned));
            }
        }
    }
    found
}

/// The first names of a path, or of the paths in braces.
fn names(path: &str) -> impl Iterator<Item = &str> {
    let (inside, braces) = match path.strip_prefix('{') {
        Some(inside) => (inside, true),
        None => (path, false),
    };
    let mut depth = 0;
    let mut starts = vec![0];
    for (at, letter) in inside.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 && braces => starts.push(at + 1),
            _ if !braces => break,
            _ => {}
        }
    }
    starts.into_iter().map(move |start| {
        let name = inside[start..].trim_start();
        name.split(|letter: char| !(letter.is_alphanumeric() || letter == '_')).next().unwrap_or("")
    })
}

/// The crate's sources, by their paths inside it.
fn sources(folder: &str) -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
    let mut files = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                files.insert(path.strip_prefix(&root).unwrap().to_owned(), text);
            }
        }
    }
    files
}

#[test]
fn modules_import_only_lower_ones() {
    for layers in [TIERS, KVSTORE, ROUTER_SERVE] {
        let files = sources(layers.folder);
        let known = layers.modules();
        let found: BTreeSet<String> = files.keys().filter_map(|path| module_of(path)).collect();
        let unnamed: Vec<&String> = found.iter().filter(|module| !known.contains(module.as_str())).collect();
        assert!(unnamed.is_empty(), "modules of {} without a layer: {unnamed:?}", layers.folder);
        let wrong = layers.wrong_arrows(&files);
        assert!(wrong.is_empty(), "{} imports upwards, or beside itself: {wrong:?}", layers.folder);
    }
}

/// The check itself: it sees every way to name a module, and no name in a comment or in a unit test.
#[test]
fn an_import_of_a_higher_module_is_found_however_it_is_written() {
    let layers =
        Layers { folder: "", layers: &[&["low", "beside"], &["mid"], &["high"]], exceptions: &[("low", "mid")] };
    let wrong = |path: &str, text: &str| {
        let files = BTreeMap::from([(PathBuf::from(path), text.to_owned())]);
        layers.wrong_arrows(&files).into_iter().map(|(_, module)| module).collect::<Vec<_>>()
    };
    assert_eq!(wrong("mid.rs", "use crate::high::Thing;"), ["high"]);
    assert_eq!(wrong("mid.rs", "use crate::{\n    low::{a, b},\n    high,\n};"), ["high"]);
    assert_eq!(wrong("mid.rs", "fn f() { crate::high::call(); }"), ["high"]);
    assert_eq!(wrong("mid.rs", "use super::high::Thing;"), ["high"]);
    assert_eq!(wrong("mid/mod.rs", "use super::high::Thing;"), ["high"]);
    assert_eq!(wrong("mid/part.rs", "use super::super::{high, low};"), ["high"]);
    assert_eq!(wrong("low.rs", "use crate::beside::Thing;"), ["beside"], "a layer has no arrows inside it");
    assert_eq!(wrong("mid/part.rs", "use super::high::Thing;"), [""; 0], "a part of the module itself");
    assert_eq!(wrong("mid.rs", "use crate::low::Thing;\nuse crate::mid::Other;"), [""; 0]);
    assert_eq!(wrong("mid.rs", "// crate::high\nuse crate::low;\nuse other_crate::high;"), [""; 0]);
    assert_eq!(wrong("mid.rs", "#[cfg(test)]\nmod tests {\n    use crate::high;\n}"), [""; 0]);
    assert_eq!(wrong("low.rs", "use crate::mid::Thing;"), [""; 0], "an exception");
}

/// ARCHITECTURE.md has a row for each layer, in the same order and words.
#[test]
fn the_layers_are_written_down() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ARCHITECTURE.md");
    let text = std::fs::read_to_string(path).unwrap();
    for layers in [TIERS, KVSTORE, ROUTER_SERVE] {
        let head = format!("| layers of `{}` |", layers.folder.trim_end_matches("src"));
        let rows = text.lines().skip_while(|line| !line.starts_with(&head)).skip(2);
        let rows = rows.take_while(|line| line.starts_with("| `"));
        let written: Vec<&str> = rows.filter_map(|line| line.split('|').nth(1)).map(str::trim).collect();
        let quoted = |layer: &&[&str]| layer.iter().map(|module| format!("`{module}`")).collect::<Vec<_>>().join(", ");
        let layers: Vec<String> = layers.layers.iter().map(quoted).collect();
        assert_eq!(written, layers, "below {head:?} of ARCHITECTURE.md");
    }
}
