//! Reading JSON as Go's decoder does: keys without regard to case, and a zero value is as good as none. Some Go runtimes
//! write their structures without tags (containerd sends `HostPort`), so this is not a courtesy.

use serde_json::{Map, Value};

use crate::result::CniError;

/// A JSON object.
pub(crate) type Object = Map<String, Value>;

/// The value of a key, without regard to case; an exact match is preferred.
pub(crate) fn field<'a>(object: &'a Object, name: &str) -> Option<&'a Value> {
    object
        .get(name)
        .or_else(|| object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value))
}

/// The same if it says more than Go's zero value.
pub(crate) fn asked<'a>(object: &'a Object, name: &str) -> Option<&'a Value> {
    field(object, name).filter(|value| asks(value))
}

/// Whether a value says more than Go's zero value, with which a field is as good as absent.
pub(crate) fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
    }
}

/// A string; an empty one counts.
pub(crate) fn string(object: &Object, name: &str) -> Result<Option<String>, CniError> {
    match field(object, name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(CniError::decoding(format!("{name} is {other}, a string was expected"))),
    }
}

/// A string that is not empty.
pub(crate) fn text(object: &Object, name: &str) -> Result<Option<String>, CniError> {
    Ok(string(object, name)?.filter(|text| !text.is_empty()))
}

/// True or false.
pub(crate) fn flag(object: &Object, name: &str) -> Result<Option<bool>, CniError> {
    match field(object, name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(on)) => Ok(Some(*on)),
        Some(other) => Err(CniError::decoding(format!("{name} is {other}, true or false was expected"))),
    }
}

/// An object.
pub(crate) fn object(object: &Object, name: &str) -> Result<Option<Object>, CniError> {
    match field(object, name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(inner)) => Ok(Some(inner.clone())),
        Some(other) => Err(CniError::decoding(format!("{name} is {other}, an object was expected"))),
    }
}

/// A list; an absent one is empty.
pub(crate) fn list<'a>(object: &'a Object, name: &str) -> Result<&'a [Value], CniError> {
    match field(object, name) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(CniError::decoding(format!("{name} is {other}, a list was expected"))),
    }
}

/// A whole number that is not negative.
pub(crate) fn number(value: &Value, name: &str) -> Result<u64, CniError> {
    value.as_u64().ok_or_else(|| CniError::decoding(format!("{name} is {value}, a number was expected")))
}

/// The first of the keys that asks for something.
pub(crate) fn first_asked<'a>(object: &Object, keys: &[&'a str]) -> Option<&'a str> {
    keys.iter().copied().find(|key| asked(object, key).is_some())
}
