//! What the layers below say went wrong.

use std::error::Error as _;

use etcd_client::Error;

/// The innermost cause, in a few words. It is the same as long as the cause is: without the time at which a certificate was looked at.
pub(super) fn cause(error: &Error) -> String {
    let text = innermost(error);
    text.split_once(": verification time").map(|(cause, _)| cause.to_owned()).unwrap_or(text)
}

/// What an answer that is no says to the operator.
pub(super) fn refusal(error: &Error) -> String {
    const ADVICE: [(&str, &str); 3] = [
        ("database space exceeded", "etcd is full: compact and defragment it, then etcdctl alarm disarm"),
        ("user name is empty", "it asks for a user: --etcd-username and FLANNELD_ETCD_PASSWORD"),
        ("permission denied", "the user needs a role for --etcd-prefix, as deploy/etcd/role.sh makes it"),
    ];
    let cause = cause(error);
    match ADVICE.iter().find(|(said, _)| cause.contains(said)) {
        Some((_, advice)) => format!("{cause} ({advice})"),
        None => cause,
    }
}

fn innermost(error: &Error) -> String {
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
