//! What holds the building up: who may import whom, and where the dangerous things may stand.
//!
//! Every check is a function from sources to violations, and every one is shown a source that breaks it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic where it stands")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

/// A source file: path from the top of the repository, and text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// The text without comments and without unit tests, by line number from 1.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let product = self.text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        product
            .lines()
            .map(|line| line.split("//").next().unwrap_or_default())
            .enumerate()
            .map(|(n, l)| (n + 1, l))
    }

    fn at(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path)
    }

    /// Whether the path is below (or is) one of these.
    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Every Rust source of the workspace.
fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    for member in ["core", "docker-plugin", "cni", "tests"] {
        collect(&root().join(member), member, &mut found);
    }
    assert!(found.len() > 50, "only {} sources found: the scan is broken", found.len());
    found
}

fn collect(dir: &Path, shown: &str, found: &mut Vec<Source>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let shown = format!("{shown}/{}", entry.file_name().to_string_lossy());
        if entry.file_type().unwrap().is_dir() {
            if !shown.ends_with("/target") {
                collect(&entry.path(), &shown, found);
            }
        } else if shown.ends_with(".rs") {
            found.push(Source { path: shown, text: fs::read_to_string(entry.path()).unwrap() });
        }
    }
}

#[track_caller]
fn none(violations: Vec<String>) {
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

#[track_caller]
fn breaks(violations: Vec<String>, expected: &str) {
    assert!(
        violations.iter().any(|violation| violation.contains(expected)),
        "{expected:?} not in {violations:#?}"
    );
}

/// A floor of `core/src`, and the floors it may import from beside itself.
const FLOORS: &[(&str, &[&str])] = &[
    ("words", &[]),
    ("decide", &["words"]),
    ("touch", &["words"]),
    ("act", &["words", "decide", "touch"]),
    ("run", &["words", "decide", "touch", "act"]),
];

/// Imports that do not point down.
fn upward(sources: &[Source]) -> Vec<String> {
    let mut violations = Vec::new();
    for source in sources {
        let Some(inner) = source.path.strip_prefix("core/src/") else { continue };
        let Some((floor, below)) = FLOORS.iter().find(|(floor, _)| {
            inner.strip_prefix(floor).is_some_and(|rest| rest.starts_with('/') || rest == ".rs")
        }) else {
            continue;
        };
        let module = inner.trim_end_matches(".rs").trim_end_matches("/mod");
        let depth = module.split('/').count();
        for (line, code) in source.code() {
            for target in roots(code, depth) {
                let is_floor = FLOORS.iter().any(|(name, _)| *name == target);
                if is_floor && target != *floor && !below.contains(&target.as_str()) {
                    violations.push(source.at(line, &format!("{floor} may not import {target}")));
                }
            }
        }
    }
    violations
}

/// The modules right below the crate's root that a line names: by `crate::`, or by enough `super::`.
fn roots(code: &str, depth: usize) -> Vec<String> {
    let supers = format!("{}::", vec!["super"; depth].join("::"));
    let mut found = Vec::new();
    for start in ["crate::", &supers] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let rest = &code[at + start.len()..];
            match rest.strip_prefix('{') {
                // A group: the first word of each of its parts.
                Some(group) => found.extend(heads(group)),
                None => found.push(word(rest)),
            }
        }
    }
    found
}

fn heads(group: &str) -> Vec<String> {
    let (mut depth, mut heads, mut fresh) = (0, Vec::new(), true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => fresh = true,
            c if fresh && (c.is_alphanumeric() || c == '_') => {
                heads.push(word(&group[at..]));
                fresh = false;
            }
            _ => {}
        }
    }
    heads
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

#[test]
fn imports_point_down() {
    none(upward(&sources()));
}

#[test]
fn an_import_that_points_up_is_seen() {
    let broken = |path: &str, text: &str| upward(&[Source::new(path, text)]);
    breaks(
        broken("core/src/decide/plan.rs", "use crate::touch::world::World;"),
        "decide may not import touch",
    );
    breaks(broken("core/src/touch/uplink.rs", "use crate::decide::plan;"), "touch may not import decide");
    breaks(broken("core/src/words/fact.rs", "let x = crate::run::cli::x();"), "words may not import run");
    breaks(broken("core/src/act/pass.rs", "use super::super::run;"), "act may not import run");
    breaks(broken("core/src/act/mod.rs", "use super::run;"), "act may not import run");
    breaks(
        broken("core/src/decide/a.rs", "use crate::{words::{x, y}, touch};"),
        "decide may not import touch",
    );
    none(broken("core/src/run/agent.rs", "use crate::{act, words}; use super::store; // crate::none"));
    none(broken("core/src/decide/backend/vxlan.rs", "use super::super::words_of; use super::touch;"));
    none(broken("core/src/decide/a.rs", "#[cfg(test)]\nmod tests {\n use crate::touch; }"));
}

/// A thing that may stand in few places only.
struct Confined {
    /// The word that gives it away; with `*` at the end, any word that begins so.
    word: &'static str,
    /// Where it is looked for.
    within: &'static [&'static str],
    /// Where it may stand.
    allowed: &'static [&'static str],
    why: &'static str,
}

const PRODUCT: &[&str] = &["core/", "docker-plugin/", "cni/"];
const KERNEL: &str = "core/src/touch/world/kernel/";

const CONFINED: &[Confined] = &[
    Confined {
        word: "netlink_*",
        within: PRODUCT,
        allowed: &[KERNEL],
        why: "interface indices and messages never leave the kernel floor",
    },
    Confined {
        word: "rtnetlink",
        within: PRODUCT,
        allowed: &["core/src/run/kernel_events.rs"],
        why: "the asynchronous library only listens",
    },
    Confined {
        word: "setns",
        within: PRODUCT,
        allowed: &["core/src/touch/world/kernel/netns.rs"],
        why: "one function enters namespaces, on a thread that ends",
    },
    Confined { word: "unshare", within: PRODUCT, allowed: &[], why: "only tests make namespaces" },
    Confined {
        word: "Command::new",
        within: PRODUCT,
        allowed: &[
            "core/src/touch/world/kernel/iptables.rs",
            "core/src/run/extension/command.rs",
            "core/src/run/ipsec/charon.rs",
            "cni/src/delegate.rs",
        ],
        why: "a program costs milliseconds and has an environment",
    },
    Confined {
        word: "tokio",
        within: PRODUCT,
        allowed: &["core/src/run/", "docker-plugin/src/"],
        why: "everything below the rim is synchronous",
    },
    Confined {
        word: "SystemTime",
        within: &["core/src/words/", "core/src/decide/"],
        allowed: &[],
        why: "a plan follows from its inputs",
    },
    Confined {
        word: "Instant",
        within: &["core/src/words/", "core/src/decide/"],
        allowed: &[],
        why: "a plan follows from its inputs",
    },
    Confined {
        word: "fastrand",
        within: &["core/src/words/", "core/src/decide/"],
        allowed: &[],
        why: "the same inputs give the same plan",
    },
    Confined {
        word: "flannel_tests",
        within: PRODUCT,
        allowed: &[],
        why: "the tests see everything and nothing sees them",
    },
    Confined {
        word: "flannel_core::run",
        within: &["cni/"],
        allowed: &[],
        why: "the CNI binary is built without the asynchronous rim",
    },
];

/// Things that stand where they may not.
fn astray(sources: &[Source]) -> Vec<String> {
    let mut violations = Vec::new();
    for source in sources {
        for rule in CONFINED.iter().filter(|rule| source.is_in(rule.within) && !source.is_in(rule.allowed)) {
            let lines = source.code().filter(|(_, code)| names(code, rule.word));
            violations
                .extend(lines.map(|(line, _)| source.at(line, &format!("{}: {}", rule.word, rule.why))));
        }
    }
    violations
}

/// Whether a line holds the word as a whole.
fn names(code: &str, word: &str) -> bool {
    let (text, open) = match word.strip_suffix('*') {
        Some(text) => (text, true),
        None => (word, false),
    };
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(text).any(|(at, _)| {
        !part(code[..at].chars().next_back()) && (open || !part(code[at + text.len()..].chars().next()))
    })
}

#[test]
fn dangerous_things_stand_where_they_may() {
    none(astray(&sources()));
}

#[test]
fn every_confined_thing_is_seen_where_it_may_not_stand() {
    for rule in CONFINED {
        let used = match rule.word {
            "netlink_*" => "use netlink_packet_route::link::LinkMessage;".to_owned(),
            word => format!("    let x = {word}(1);"),
        };
        let place = format!("{}anything.rs", rule.within.last().unwrap());
        breaks(astray(&[Source::new(&place, &used)]), rule.why);
        none(astray(&[Source::new(
            &place,
            &format!("// {used}\nlet x = my_{}y;", rule.word.trim_end_matches('*')),
        )]));
        if let Some(allowed) = rule.allowed.first() {
            let quiet = astray(&[Source::new(&format!("{allowed}x.rs"), &used)]);
            none(quiet.into_iter().filter(|violation| violation.contains(rule.why)).collect());
        }
    }
}

#[test]
fn every_place_with_a_permit_uses_it() {
    // A permit that nobody uses would let the next one in unseen.
    let all = sources();
    for rule in CONFINED {
        for allowed in rule.allowed {
            let mut lines = all.iter().filter(|source| source.is_in(&[allowed])).flat_map(Source::code);
            let used = lines.any(|(_, code)| names(code, rule.word));
            assert!(used, "{} may use {} and does not: take the permit away", allowed, rule.word);
        }
    }
}

const LINES_MAX: usize = 600;

/// Files that are longer, each with the reason.
const LONG: &[(&str, &str)] =
    &[("tests/tests/flanneld_faults.rs", "one fault after another, each a scene of its own")];

/// Files that are too long, and permits that are not needed any more.
fn long(sources: &[Source], permits: &[(&str, &str)]) -> Vec<String> {
    let permits: BTreeMap<_, _> = permits.iter().copied().collect();
    let mut violations: Vec<_> = sources
        .iter()
        .map(|source| (source, source.text.lines().count()))
        .filter(|(source, lines)| (*lines > LINES_MAX) != permits.contains_key(source.path.as_str()))
        .map(|(source, lines)| format!("{}: {lines} lines, the limit is {LINES_MAX}", source.path))
        .collect();
    let known: BTreeSet<_> = sources.iter().map(|source| source.path.as_str()).collect();
    violations
        .extend(permits.keys().filter(|path| !known.contains(*path)).map(|path| format!("{path}: is gone")));
    violations
}

#[test]
fn files_are_short() {
    none(long(&sources(), LONG));
}

#[test]
fn a_long_file_and_a_stale_permit_are_seen() {
    let file = |lines: usize| [Source::new("core/src/words/x.rs", &"\n".repeat(lines))];
    breaks(long(&file(601), &[]), "x.rs: 601 lines");
    none(long(&file(600), &[]));
    none(long(&file(601), &[("core/src/words/x.rs", "a table")]));
    breaks(long(&file(10), &[("core/src/words/x.rs", "a table")]), "x.rs: 10 lines");
    breaks(long(&file(10), &[("core/src/words/y.rs", "a table")]), "y.rs: is gone");
}

/// Crates that the CNI binary must not contain: starting up is its budget.
const HEAVY: &[&str] = &["tokio", "etcd-client", "kube", "axum", "hyper", "tonic", "rtnetlink", "clap"];

fn heavy(tree: &str) -> Vec<String> {
    let crates = tree.lines().filter_map(|line| line.split(' ').next());
    crates.filter(|name| HEAVY.contains(name)).map(|name| format!("the CNI binary contains {name}")).collect()
}

fn cargo(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO")).args(args).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "cargo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_cni_binary_is_light() {
    let tree = ["tree", "--offline", "--locked", "-e", "normal", "--prefix", "none", "-p"];
    let of = |package: &str| cargo(&[&tree[..], &[package]].concat());
    let cni = of("flannel-cni");
    assert!(cni.contains("flannel-core v"), "{cni}");
    none(heavy(&cni));
    // The same eyes see them where they are.
    breaks(heavy(&of("flannel-docker-plugin")), "contains tokio");
}

/// Direct dependencies of which the lock file has more than one version.
fn doubled(direct: &BTreeSet<String>, lock: &str) -> Vec<String> {
    let mut versions = BTreeMap::<&str, BTreeSet<&str>>::new();
    let mut name = "";
    for line in lock.lines() {
        if let Some(found) = line.strip_prefix("name = ") {
            name = found.trim_matches('"');
        } else if let Some(version) = line.strip_prefix("version = ") {
            versions.entry(name).or_default().insert(version.trim_matches('"'));
        }
    }
    versions
        .iter()
        .filter(|(name, versions)| direct.contains(**name) && versions.len() > 1)
        .map(|(name, versions)| format!("{name} comes in {versions:?}"))
        .collect()
}

#[test]
fn there_is_one_version_of_each_direct_dependency() {
    let text = cargo(&["metadata", "--offline", "--locked", "--no-deps", "--format-version", "1"]);
    let metadata: serde_json::Value = serde_json::from_str(&text).unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter();
    let dependencies = packages.flat_map(|package| package["dependencies"].as_array().unwrap());
    let direct: BTreeSet<String> =
        dependencies.map(|dependency| dependency["name"].as_str().unwrap().to_owned()).collect();
    assert!(direct.contains("nix") && direct.contains("tokio"), "{direct:?}");
    none(doubled(&direct, &fs::read_to_string(root().join("Cargo.lock")).unwrap()));
}

#[test]
fn a_second_version_is_seen() {
    let package =
        |name: &str, version: &str| format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n\n");
    let lock = [
        package("nix", "0.30.0"),
        package("nix", "0.31.0"),
        package("syn", "2.0.0"),
        package("syn", "3.0.0"),
    ];
    let direct = BTreeSet::from(["nix".to_owned()]);
    assert_eq!(doubled(&direct, &lock.concat()), [r#"nix comes in {"0.30.0", "0.31.0"}"#]);
}

/// Dependencies of a member that do not take the workspace's version.
fn unpinned(path: &str, manifest: &str) -> Vec<String> {
    let mut section = "";
    let mut violations = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
        } else if section.ends_with("dependencies") && line.contains('=') && !line.starts_with('#') {
            let pinned = line.contains(".workspace = true") || line.contains("workspace = true");
            if !pinned {
                violations.push(format!("{path}: {line}"));
            }
        }
    }
    violations
}

#[test]
fn members_take_the_workspaces_versions() {
    for member in ["core", "docker-plugin", "cni", "tests"] {
        let path = format!("{member}/Cargo.toml");
        let manifest = fs::read_to_string(root().join(&path)).unwrap();
        assert!(manifest.contains("[dependencies]"), "{path}");
        none(unpinned(&path, &manifest));
    }
    breaks(unpinned("x", "[dependencies]\nnix = \"0.31\"\n"), "nix");
    none(unpinned("x", "[package]\nname = \"x\"\n[dependencies]\nnix.workspace = true\n"));
}
