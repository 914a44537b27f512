//! A table that several programs write, each after a look at what is in it: nobody loses what another wrote meanwhile.

use super::wire::error_code;
use super::{Netfilter, encode};
use crate::touch::world::WorldError;
use crate::words::rule::{Table, TableName};

/// Others may write rules between our look and our transaction; then we look again.
const TRIES_MAX: usize = 16;

impl Netfilter {
    /// Makes of a table what `revised` makes of it as it is now; none is no table. Nothing is written if that is the same.
    ///
    /// # Errors
    /// `Refused` if the kernel does not take it; `Unsupported` if others change the rules faster than we do.
    pub fn revise(
        &mut self,
        name: &TableName,
        revised: impl Fn(Option<&Table>) -> Option<Table>,
    ) -> Result<(), WorldError> {
        for _ in 0..TRIES_MAX {
            let generation = if self.is_absent()? { 0 } else { self.socket.generation()? };
            let have = self.table(name)?;
            let batch = match (&have, revised(have.as_ref())) {
                (None, None) => return Ok(()),
                (Some(have), Some(want)) if *have == want => return Ok(()),
                (Some(_), None) => encode::gone(name),
                (Some(have), Some(want)) if have.strange.is_empty() => encode::difference(have, &want),
                (_, Some(want)) => encode::whole(&want),
            };
            match self.socket.commit(batch.unless_changed_since(generation)) {
                // Somebody else was faster.
                Err(error) if error_code(&error) == Some(libc::ERESTART) => {}
                other => return other,
            }
        }
        Err(WorldError::Unsupported {
            action: format!("write table {name}"),
            what: format!("others changed the rules of this host {TRIES_MAX} times meanwhile"),
        })
    }
}
