//! What people write on a conversation: a title, and metadata for programs. Pure.
//!
//! Nobody but people reads it: no guest, no log, no metric. Bounded, so that a list of a hundred conversations is a page and not a download.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// Characters of a title.
pub const TITLE_CHARS_MAX: usize = 200;
/// Entries of the metadata.
const METADATA_ENTRIES_MAX: usize = 16;
/// Characters of a name in it.
const METADATA_NAME_CHARS_MAX: usize = 64;
/// Characters of a value.
const METADATA_VALUE_CHARS_MAX: usize = 512;

/// What is to be written. What is absent stays as it is; null takes away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NotesChange {
    /// 1 to 200 characters of one line; null for none.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 200)]
    pub title: Option<Option<String>>,
    /// All of it: at most 16 entries, names of 1 to 64 characters, values of at most 512; null for none.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<BTreeMap<String, String>>)]
    pub metadata: Option<Option<BTreeMap<String, String>>>,
}

/// Tells null from absent.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

impl NotesChange {
    /// The metadata as it is stored; `None` for none.
    pub fn metadata_json(&self) -> Option<String> {
        let metadata = self.metadata.as_ref()?.as_ref()?;
        Some(serde_json::to_string(metadata).expect("texts serialise"))
    }

    /// Names the first thing that is out of bounds, with what to do.
    pub fn check(&self) -> Result<(), String> {
        if let Some(Some(title)) = &self.title {
            let chars = title.chars().count();
            if !(1..=TITLE_CHARS_MAX).contains(&chars) || title.chars().any(char::is_control) {
                return Err(format!("title must be 1 to {TITLE_CHARS_MAX} characters of one line, or null"));
            }
        }
        let Some(Some(metadata)) = &self.metadata else { return Ok(()) };
        if metadata.len() > METADATA_ENTRIES_MAX {
            return Err(format!("metadata has {} entries; at most {METADATA_ENTRIES_MAX}", metadata.len()));
        }
        for (name, value) in metadata {
            let chars = name.chars().count();
            if !(1..=METADATA_NAME_CHARS_MAX).contains(&chars) || name.chars().any(char::is_control) {
                return Err(format!("metadata: a name must be 1 to {METADATA_NAME_CHARS_MAX} characters of one line"));
            }
            if value.chars().count() > METADATA_VALUE_CHARS_MAX || value.contains('\0') {
                return Err(format!(
                    "metadata: a value must be at most {METADATA_VALUE_CHARS_MAX} characters without NUL"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> NotesChange {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn null_takes_away_and_absent_leaves() {
        assert_eq!(parse("{}"), NotesChange::default());
        assert_eq!(parse(r#"{"title": null}"#).title, Some(None));
        assert_eq!(parse(r#"{"title": "a"}"#).title, Some(Some("a".to_owned())));
        assert_eq!(parse(r#"{"metadata": null}"#).metadata, Some(None));
        assert!(serde_json::from_str::<NotesChange>(r#"{"titel": "a"}"#).is_err());
        assert!(serde_json::from_str::<NotesChange>(r#"{"metadata": {"a": 1}}"#).is_err(), "values are texts");
    }

    #[test]
    fn every_part_has_its_bound() {
        let title = |title: &str| NotesChange { title: Some(Some(title.to_owned())), ..NotesChange::default() };
        title(&"ä".repeat(200)).check().unwrap();
        for bad in ["", &"a".repeat(201), "two\nlines", "\u{0}"] {
            assert!(title(bad).check().unwrap_err().starts_with("title"), "{bad:?}");
        }
        let metadata = |entries: Vec<(String, String)>| NotesChange {
            metadata: Some(Some(entries.into_iter().collect())),
            ..NotesChange::default()
        };
        let full = (0..16).map(|n| (format!("{n:064}"), "\u{1}ä\"".repeat(170))).collect();
        metadata(full).check().unwrap();
        for bad in [
            (0..17).map(|n| (n.to_string(), String::new())).collect(),
            vec![(String::new(), String::new())],
            vec![("a".repeat(65), String::new())],
            vec![("a".to_owned(), "a".repeat(513))],
            vec![("a".to_owned(), "\0".to_owned())],
        ] {
            assert!(metadata(bad).check().unwrap_err().starts_with("metadata"));
        }
    }

    #[test]
    fn the_largest_metadata_fits_the_tables_bound() {
        let full: BTreeMap<String, String> = (0..16).map(|n| (format!("{n:064}"), "\u{1}".repeat(512))).collect();
        assert!(serde_json::to_string(&full).unwrap().len() <= 65_536);
    }
}
