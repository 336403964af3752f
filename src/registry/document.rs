//! JSON objects of which single members are changed. All others stay byte by byte as they were written, in their order:
//! what a tool does not know it must not change, and a document that is written anew must come out the same each time.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

use crate::error::{Error, Result};

/// A JSON object.
#[derive(Debug, Clone, Default)]
pub struct Object {
    members: Vec<(String, Box<RawValue>)>,
}

impl Object {
    /// Parses one; `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Malformed`] for anything else, and for an object with two members of one name: readers disagree which of
    /// them counts.
    pub fn parse(what: &str, bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|error| Error::malformed(what, error.to_string()))
    }

    /// The member `key`, `None` if it is absent or null.
    ///
    /// # Errors
    /// [`Error::Malformed`] if it is no `T`.
    pub fn get<T: DeserializeOwned>(&self, what: &str, key: &str) -> Result<Option<T>> {
        let Some((_, value)) = self.members.iter().find(|(name, _)| name == key) else {
            return Ok(None);
        };
        serde_json::from_str(value.get())
            .map_err(|error| Error::malformed(format!("{key:?} of {what}"), error.to_string()))
    }

    /// Sets the member `key`, in its place or behind all others.
    ///
    /// # Errors
    /// [`Error::Malformed`] if JSON cannot say `value`.
    pub fn set(&mut self, key: &str, value: &(impl Serialize + ?Sized)) -> Result<()> {
        let value = to_raw_value(value).map_err(|error| Error::malformed(key, error.to_string()))?;
        match self.members.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.members.push((key.to_owned(), value)),
        }
        Ok(())
    }

    /// Takes the member `key` out; whether it was there.
    pub fn remove(&mut self, key: &str) -> bool {
        let before = self.members.len();
        self.members.retain(|(name, _)| name != key);
        self.members.len() < before
    }

    /// Keeps the members whose names `keep` wants.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.members.retain(|(name, _)| keep(name));
    }

    /// Whether it has no members.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The text.
    ///
    /// # Errors
    /// [`Error::Malformed`], which nothing that was parsed is.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| Error::malformed("JSON", error.to_string()))
    }
}

impl Serialize for Object {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.members.len()))?;
        for (key, value) in &self.members {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut names = HashSet::new();
                let mut members = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    if !names.insert(key.clone()) {
                        let shown: String = key.chars().take(40).collect();
                        return Err(serde::de::Error::custom(format!("two members {shown:?}")));
                    }
                    members.push((key, value));
                }
                Ok(Object { members })
            }
        }
        deserializer.deserialize_map(Members)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_changed_stays_as_it_is_written() {
        let text = r#"{"z":1.50,"a":{ "y" : [1e2,"\u00e4"] },"m":null,"n":123456789012345678901234567890}"#;
        let mut object = Object::parse("x", text.as_bytes()).unwrap();
        assert_eq!(object.to_bytes().unwrap(), text.as_bytes());
        object.set("a", &[1]).unwrap();
        object.set("new", "text").unwrap();
        assert!(object.remove("m") && !object.remove("m"));
        let expected = r#"{"z":1.50,"a":[1],"n":123456789012345678901234567890,"new":"text"}"#;
        assert_eq!(object.to_bytes().unwrap(), expected.as_bytes());
    }

    #[test]
    fn members_are_read_as_what_they_should_be() {
        let object = Object::parse("x", br#"{"a":[{"b":1}],"n":null}"#).unwrap();
        let inner = object.get::<Vec<Object>>("x", "a").unwrap().unwrap();
        assert_eq!(inner[0].get::<u32>("x", "b").unwrap(), Some(1));
        assert_eq!(object.get::<String>("x", "n").unwrap(), None);
        assert_eq!(object.get::<String>("x", "absent").unwrap(), None);
        let error = object.get::<String>("doc", "a").unwrap_err();
        assert_eq!(error.exit_code(), 7);
        assert!(error.to_string().contains("\"a\" of doc"), "{error}");
    }

    #[test]
    fn two_members_of_one_name_are_refused() {
        for text in [r#"{"a":1,"a":1}"#, r#"{"a":1,"\u0061":2}"#, "[]", "1", "{", ""] {
            assert_eq!(
                Object::parse("x", text.as_bytes()).unwrap_err().exit_code(),
                7,
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_object_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Object::parse("x", &bytes);
        }
    }
}
