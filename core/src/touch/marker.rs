//! A word that the first comer writes and everyone after it reads: a symbolic link whose text is the word. Making one
//! is atomic and exclusive, reading one is a single system call, and `ls -l` shows it.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::words::name::LinkName;

/// Makes the marker say `word` if it does not say anything yet; the answer is what it says now. The directory it lies in
/// is made if need be.
pub fn agree(marker: &Path, word: &Path) -> io::Result<PathBuf> {
    const TRIES: usize = 8;
    for _ in 0..TRIES {
        if let Some(said) = read(marker)? {
            return Ok(said);
        }
        match symlink(word, marker) {
            Ok(()) => return Ok(word.to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => match marker.parent() {
                Some(dir) => fs::create_dir_all(dir)?,
                None => return Err(error),
            },
            // Somebody was faster.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(ErrorKind::ResourceBusy, format!("{} comes and goes", marker.display())))
}

/// What the marker says, if anything.
pub fn read(marker: &Path) -> io::Result<Option<PathBuf>> {
    match fs::read_link(marker) {
        Ok(word) => Ok(Some(word)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Takes the word back; nothing happens if there is none.
pub fn withdraw(marker: &Path) -> io::Result<()> {
    match fs::remove_file(marker) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Why the node's bridge of a network could not be settled.
#[derive(Debug, thiserror::Error)]
pub enum BridgeNameError {
    /// The marker could not be read or made.
    #[error("could not read or make {marker}")]
    Marker {
        /// The file.
        marker: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody else chose another name first.
    #[error(
        "the bridge {wanted} was asked for, but this network has the bridge {first} on this node \
             (as {marker} says): use that name, or remove that file once {first} is gone"
    )]
    Other {
        /// The name asked for now.
        wanted: String,
        /// The name of the first comer.
        first: String,
        /// Where it is written.
        marker: PathBuf,
    },
}

/// The file beside `subnet.env` that says which bridge the network has on this node.
pub fn bridge_marker(subnet_file: &Path) -> PathBuf {
    subnet_file.with_extension("bridge")
}

/// Settles the name of the node's bridge of the network that `subnet_file` describes: an explicit name wins for the first comer,
/// a second, different one is an error; without one the first comer's name is taken, or `default` if this is the first.
pub fn settle_bridge(
    subnet_file: &Path,
    explicit: Option<LinkName>,
    default: LinkName,
) -> Result<LinkName, BridgeNameError> {
    let marker = bridge_marker(subnet_file);
    let wanted = explicit.unwrap_or(default);
    let said = agree(&marker, Path::new(wanted.as_str()))
        .map_err(|source| BridgeNameError::Marker { marker: marker.clone(), source })?;
    let said = said.to_string_lossy();
    match LinkName::new(&said) {
        Ok(first) if explicit.is_none_or(|name| name == first) => Ok(first),
        _ => Err(BridgeNameError::Other {
            wanted: wanted.as_str().to_owned(),
            first: said.into_owned(),
            marker,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str) -> LinkName {
        LinkName::new(name).unwrap()
    }

    #[test]
    fn the_first_comer_names_the_bridge() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("flannel/subnet.env");
        assert_eq!(settle_bridge(&file, Some(link("br7")), link("cni0")).unwrap(), link("br7"));
        assert_eq!(settle_bridge(&file, None, link("cni0")).unwrap(), link("br7"));
        assert_eq!(settle_bridge(&file, Some(link("br7")), link("cni0")).unwrap(), link("br7"));
        let error = settle_bridge(&file, Some(link("br8")), link("cni0")).unwrap_err().to_string();
        assert!(error.contains("br8") && error.contains("br7") && error.contains("subnet.bridge"), "{error}");
        withdraw(&bridge_marker(&file)).unwrap();
        withdraw(&bridge_marker(&file)).unwrap();
        assert_eq!(settle_bridge(&file, None, link("cni0")).unwrap(), link("cni0"));
    }

    #[test]
    fn of_many_first_comers_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let marker = dir.path().join("m");
        let said: Vec<PathBuf> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|n| {
                    scope.spawn({
                        let marker = &marker;
                        move || agree(marker, Path::new(&n.to_string())).unwrap()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(said.iter().all(|word| *word == said[0]), "{said:?}");
    }
}
