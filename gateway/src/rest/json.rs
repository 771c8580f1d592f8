//! How REST shows protobuf messages as JSON.
//!
//! It is protobuf's own JSON mapping (<https://protobuf.dev/programming-guides/json/>) with what the published
//! clients expect:
//!
//! - 64-bit integers are numbers, enum values are lower-case names without their type's prefix
//!   (`SANDBOX_STATE_RUNNING` is `"running"`), and scalars that hold their default are shown;
//! - `bytes` fields marked `(oc.v1.text)` are text. Where they are not UTF-8 the text has U+FFFD, and a second
//!   member with `Base64` appended to the name has the exact bytes;
//! - `google.protobuf.Struct` is any JSON object;
//! - in requests, keys match without regard to case and unknown ones are skipped.

pub mod decode;
pub mod encode;
mod structs;
pub mod value;

use std::collections::HashSet;

use prost_reflect::{EnumDescriptor, FieldDescriptor};

use crate::surface::{Surface, SurfaceError};

/// Appended to the name of a text field for the member with its exact bytes.
const BASE64_SUFFIX: &str = "Base64";

/// What the mapping must know beyond the descriptors it is given.
#[derive(Debug)]
pub struct Json {
    /// Full names of the `bytes` fields that are text.
    text: HashSet<String>,
}

impl Json {
    /// Reads which fields are text.
    ///
    /// # Errors
    /// The contract lacks the option that says so.
    pub fn new(surface: &Surface) -> Result<Self, SurfaceError> {
        let option = surface
            .pool()
            .get_extension_by_name("oc.v1.text")
            .ok_or(SurfaceError::MissingOption("oc.v1.text"))?;
        let text = surface
            .pool()
            .all_messages()
            .flat_map(|message| message.fields().collect::<Vec<_>>())
            .filter(|field| field.options().get_extension(&option).as_bool() == Some(true))
            .map(|field| field.full_name().to_owned())
            .collect();
        Ok(Self { text })
    }

    fn is_text(&self, field: &FieldDescriptor) -> bool {
        self.text.contains(field.full_name())
    }
}

/// What every value of the enum begins with: `SandboxState` gives `SANDBOX_STATE_`.
fn enum_prefix(descriptor: &EnumDescriptor) -> String {
    let mut prefix = String::new();
    for (index, letter) in descriptor.name().chars().enumerate() {
        if letter.is_ascii_uppercase() && index > 0 {
            prefix.push('_');
        }
        prefix.push(letter.to_ascii_uppercase());
    }
    prefix.push('_');
    prefix
}
