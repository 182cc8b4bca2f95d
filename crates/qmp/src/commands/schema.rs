//! What QEMU can be asked. Read it through [`crate::Abilities`].

use serde::Deserialize;

use super::command;

command! {
    /// Asks for all commands, events and types.
    QueryQmpSchema = "query-qmp-schema" -> Vec<SchemaEntry> {}
}

/// A command, an event or a type. Types are named by numbers that mean nothing outside one answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct SchemaEntry {
    /// Its name.
    pub name: String,
    /// What it is: `command`, `event`, `object`, `enum`, `array`, `alternate` or `builtin`.
    #[serde(rename = "meta-type")]
    pub meta_type: String,
    /// Of a command or event: the type of its arguments.
    #[serde(rename = "arg-type")]
    pub arg_type: Option<String>,
    /// Of an array: the type of its elements.
    #[serde(rename = "element-type")]
    pub element_type: Option<String>,
    /// Of an object or an alternate: its parts.
    #[serde(default)]
    pub members: Vec<SchemaMember>,
    /// Of an object: the part that says which variant it is.
    pub tag: Option<String>,
    /// Of an object: what it has besides, by the tag.
    #[serde(default)]
    pub variants: Vec<SchemaVariant>,
    /// Of an enum: its words.
    #[serde(default)]
    pub values: Vec<String>,
}

/// A part of an object or an alternate, or since QEMU 6.2 of an enum.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct SchemaMember {
    /// Its name; an alternate's parts have none.
    #[serde(default)]
    pub name: String,
    /// Its type; an enum's parts have none.
    #[serde(rename = "type", default)]
    pub type_name: String,
    /// Present (and `null`) when it may be left out.
    #[serde(default, deserialize_with = "present")]
    pub default: bool,
}

/// What an object has besides when its tag has this word.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct SchemaVariant {
    /// The tag's word.
    #[serde(rename = "case")]
    pub word: String,
    /// The type that has the parts.
    #[serde(rename = "type")]
    pub type_name: String,
}

fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    serde::de::IgnoredAny::deserialize(deserializer).map(|_| true)
}
