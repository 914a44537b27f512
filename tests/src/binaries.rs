//! Where the binaries under test are.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Says where the binaries are when they are not beside the test: a directory.
pub const BIN_DIR_VARIABLE: &str = "FLANNEL_BIN_DIR";

/// The directory of the binaries: `FLANNEL_BIN_DIR`, else that of this profile, found from the running test.
pub fn dir() -> Result<PathBuf> {
    if let Some(dir) = env::var_os(BIN_DIR_VARIABLE) {
        let dir = PathBuf::from(dir);
        let absolute = dir.canonicalize();
        return absolute
            .with_context(|| format!("{BIN_DIR_VARIABLE} names {}, which is not there", dir.display()));
    }
    let test = env::current_exe().context("could not find out where this test runs from")?;
    // A test is target/<profile>/deps/<name>-<hash>, a binary (the quickstart) is target/<profile>/<name>.
    let dir = test.parent().filter(|dir| dir.ends_with("deps")).map_or(test.as_path(), |deps| deps);
    Ok(dir.parent().context("the test's binary is in no directory")?.to_owned())
}

/// The path of one binary (`flanneld`, `flannel-docker-plugin`, `flannel`) outside the hosts. Inside every host it is on the
/// search path, so that its bare name is enough.
pub fn path(name: &str) -> Result<PathBuf> {
    let dir = dir()?;
    let path = dir.join(name);
    if !path.is_file() {
        bail!(
            "there is no {name} in {}: build it with `make build` (`cargo build --workspace`), or say where it is in {BIN_DIR_VARIABLE}",
            dir.display()
        );
    }
    Ok(path)
}
