//! What the layers below say went wrong.

use std::error::Error as _;

use etcd_client::Error;

/// The innermost cause, in a few words.
pub(super) fn cause(error: &Error) -> String {
    let outer = match error {
        Error::GRpcStatus(status) => {
            let mut inner = status.source();
            while let Some(next) = inner.and_then(std::error::Error::source) {
                inner = Some(next);
            }
            return inner.map_or_else(|| status.message().to_owned(), ToString::to_string);
        }
        Error::TransportError(error) => error.source(),
        _ => None,
    };
    let mut inner = outer;
    while let Some(next) = inner.and_then(std::error::Error::source) {
        inner = Some(next);
    }
    inner.map_or_else(|| error.to_string(), ToString::to_string)
}
