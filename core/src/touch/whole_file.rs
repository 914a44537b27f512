//! Small files that are written whole: a reader sees the old content or the new one, never a part, and what was written is
//! there after a crash.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Bytes of a content that are written at once.
const BUFFER: usize = 32 * 1024;

/// Writes a file in one step: into a hidden file beside it, synced, renamed over it, and the directory synced. The directory
/// is made if need be. `mode` holds whatever the umask.
pub fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    write_by(path, mode, |file| file.write_all(content))
}

/// The same for a content that is long, and need never be in memory as a whole.
pub fn write_by(
    path: &Path,
    mode: u32,
    content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(dir)?;
    let mut hidden = OsString::from(".");
    hidden.push(path.file_name().unwrap_or_default());
    hidden.push(format!(".{}.new", std::process::id()));
    let fresh = dir.join(hidden);
    let written = replace(&fresh, path, mode, content);
    if written.is_err() {
        // Already failing; the reason matters, not a stray temporary file.
        let _ = fs::remove_file(&fresh);
    }
    written?;
    File::open(dir)?.sync_all()
}

fn replace(
    fresh: &Path,
    path: &Path,
    mode: u32,
    content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(fresh)?;
    let mut file = BufWriter::with_capacity(BUFFER, file);
    content(&mut file)?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()?;
    fs::rename(fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_made_and_nothing_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/file");
        write(&path, b"one", 0o600).unwrap();
        write(&path, b"two", 0o644).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
        assert!(write(&path.join("below"), b"", 0o600).is_err());
        // What breaks off leaves the file as it was, and nothing beside it.
        let broken = write_by(&path, 0o644, |file| {
            file.write_all(&[b'x'; 3 * BUFFER])?;
            Err(io::ErrorKind::Other.into())
        });
        assert!(broken.is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
    }
}
