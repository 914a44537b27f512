use super::*;

use std::os::unix::fs::MetadataExt;

const NAMES: [&str; 3] = ["bandwidth", "bridge", "portmap"];

fn line(words: &str) -> Result<Command, Trouble> {
    parse(words.split_whitespace().map(OsString::from), &NAMES)
}

fn wish(dir: &Path) -> Wish {
    Wish {
        bin_dir: dir.join("bin"),
        conf_dir: Some(dir.join("net.d")),
        names: vec!["bridge".to_owned(), "portmap".to_owned()],
        force: false,
    }
}

fn program(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("program");
    fs::write(&path, text).unwrap();
    path
}

/// The report with the directory's name taken out.
fn done(dir: &Path, wish: &Wish, text: &str) -> String {
    install(wish, &program(dir, text)).unwrap().replace(&format!("{}/", dir.display()), "")
}

#[test]
fn a_command_line_is_understood_or_refused_by_name() {
    let Ok(Command::Install(all)) = line("--install") else { panic!("not understood") };
    assert_eq!(all.bin_dir, Path::new("/opt/cni/bin"));
    assert_eq!(all.conf_dir.as_deref(), Some(Path::new("/etc/cni/net.d")));
    assert_eq!(all.names, NAMES);
    let Ok(Command::Install(some)) =
        line("--install --bin-dir=/a --conf-dir /b --link bridge --link=portmap --force")
    else {
        panic!("not understood")
    };
    let names = ["bridge", "portmap"].map(str::to_owned).to_vec();
    let expected = Wish { bin_dir: "/a".into(), conf_dir: Some("/b".into()), names, force: true };
    assert_eq!(some, expected);
    let Ok(Command::Install(bare)) = line("--no-links --no-conf --install") else { panic!("not understood") };
    assert!(bare.names.is_empty() && bare.conf_dir.is_none());
    assert_eq!(line("--version").unwrap(), Command::Version);
    assert_eq!(line("--install -h").unwrap(), Command::Help);

    for (words, says) in [
        ("--instal", "--instal is unknown"),
        ("install", "install is unknown"),
        ("--install /opt/cni/bin", "/opt/cni/bin is unknown"),
        ("--install --bin-dir", "--bin-dir wants a value"),
        ("--install --bin-dir=", "--bin-dir wants a value"),
        ("--install --force=yes", "--force takes no value"),
        ("--install --link dhcp", "--link dhcp: the names are bandwidth, bridge"),
        ("--bin-dir /a", "--bin-dir goes with --install"),
        ("--install --no-conf --conf-dir /b", "contradict"),
        ("--install --link bridge --no-links", "contradict"),
    ] {
        let said = line(words).unwrap_err().to_string();
        assert!(said.contains(says) && said.contains("flannel --help"), "{words}: {said}");
    }
}

#[test]
fn everything_is_put_in_place_and_again() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, wish) = (temp.path(), wish(temp.path()));
    let first = "installed bin/flannel (0.1.0)\ninstalled bin/flannel-plugins (0.1.0)\nlinked bin/bridge\nlinked bin/portmap\n\
                 installed net.d/10-flannel.conflist\n";
    assert_eq!(done(dir, &wish, "one"), first.replace("0.1.0", env!("CARGO_PKG_VERSION")));
    let mode = |name: &str| fs::metadata(dir.join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("bin/flannel"), mode("net.d/10-flannel.conflist")), (0o755, 0o644));
    assert_eq!(fs::read_link(dir.join("bin/bridge")).unwrap(), Path::new("flannel-plugins"));

    let again = "unchanged bin/flannel\nunchanged bin/flannel-plugins\nunchanged bin/bridge\nunchanged bin/portmap\n\
                 unchanged net.d/10-flannel.conflist\n";
    assert_eq!(done(dir, &wish, "one"), again);
    // The new binary is another file: whoever runs the old one keeps it.
    let old = File::open(dir.join("bin/flannel")).unwrap();
    assert!(done(dir, &wish, "two").starts_with("installed bin/flannel"));
    assert_eq!(old.metadata().unwrap().nlink(), 0);
    assert_eq!(fs::read_to_string(dir.join("bin/portmap")).unwrap(), "two");
    // Whoever overwrites `flannel` in place, as `cp` does, changes that one only.
    fs::write(dir.join("bin/flannel"), "Go").unwrap();
    assert_eq!(fs::read_to_string(dir.join("bin/bridge")).unwrap(), "two");
    let names: Vec<_> = fs::read_dir(dir.join("bin")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 4, "{names:?}");
}

#[test]
fn what_others_put_there_stays_unless_told_otherwise() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, mut wish) = (temp.path(), wish(temp.path()));
    fs::create_dir_all(dir.join("bin")).unwrap();
    fs::create_dir_all(dir.join("net.d")).unwrap();
    fs::write(dir.join("bin/bridge"), "Go").unwrap();
    symlink("/nowhere/portmap", dir.join("bin/portmap")).unwrap();
    fs::write(dir.join("net.d/10-flannel.conflist"), "edited").unwrap();
    fs::write(dir.join("net.d/05-other.conflist"), "{}").unwrap();
    let said = done(dir, &wish, "ours");
    for line in [
        "kept bin/bridge: another program's; --force replaces it\n",
        "linked bin/portmap\n",
        "kept net.d/10-flannel.conflist: it differs; --force replaces it\n",
        "note: net.d/05-other.conflist comes first; containerd uses that one alone\n",
    ] {
        assert!(said.contains(line), "{said}");
    }
    assert_eq!(fs::read_to_string(dir.join("bin/bridge")).unwrap(), "Go");
    wish.force = true;
    let said = done(dir, &wish, "ours");
    assert!(
        said.contains("linked bin/bridge") && said.contains("installed net.d/10-flannel.conflist"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(dir.join("bin/bridge")).unwrap(), "ours");
    assert_eq!(fs::read_to_string(dir.join("net.d/10-flannel.conflist")).unwrap(), CONFLIST_TEXT);
}

#[test]
fn a_flannel_network_of_another_name_is_enough() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, mut wish) = (temp.path(), wish(temp.path()));
    fs::create_dir_all(dir.join("net.d")).unwrap();
    for (file, text) in [
        ("10-mine.conf", r#"{"name":"x","type":"flannel"}"#),
        ("10-mine.conflist", r#"{"name":"x","plugins":[{"type":"flannel"}]}"#),
    ] {
        let file = dir.join("net.d").join(file);
        fs::write(&file, text).unwrap();
        let said = done(dir, &wish, "ours");
        assert!(said.contains("it is a flannel network; --force adds 10-flannel.conflist\n"), "{said}");
        assert!(!dir.join("net.d/10-flannel.conflist").exists());
        fs::remove_file(file).unwrap();
    }
    wish.conf_dir = None;
    wish.names.clear();
    assert!(done(dir, &wish, "new").starts_with("installed bin/flannel ("));
    assert!(!done(dir, &wish, "new").contains("net.d"));
    assert_eq!(fs::read_to_string(dir.join("bin/flannel-plugins")).unwrap(), "ours");
}

#[test]
fn what_cannot_be_written_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, wish) = (temp.path(), wish(temp.path()));
    fs::create_dir_all(dir.join("bin/flannel/full")).unwrap();
    let said = install(&wish, &program(dir, "ours")).unwrap_err().to_string();
    assert!(said.starts_with("could not write ") && said.contains("bin/flannel: "), "{said}");
    assert_eq!(fs::read_dir(dir.join("bin")).unwrap().count(), 1, "a draft was left");
}
