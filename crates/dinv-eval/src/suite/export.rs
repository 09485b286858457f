//! Writing a suite as a folder that any tool can read.

use std::fs;
use std::path::Path;

use difference_inversion::util::files::{HiddenFolder, folder_of, is_empty, sweep};
use difference_inversion::{Error, Result};
use serde_json::{Map, Value, json};

use super::{Entry, MANIFEST, SUITE, Suite};

impl Suite {
    /// Writes the suite to `folder`, which must be empty or absent: `suite.json`,
    /// `manifest.jsonl` and `pictures/NAME/`, all at once.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the folder is not empty, [`Error::Io`] if a file cannot be read or
    /// written.
    pub fn export(&self, folder: &Path) -> Result<()> {
        let occupied = match fs::read_dir(folder) {
            Ok(_) => !is_empty(folder),
            Err(_) => folder.exists(),
        };
        if occupied {
            return Err(Error::invalid_file(folder, "something is there already"));
        }
        let parent = folder_of(folder);
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        sweep(parent);
        let staging = HiddenFolder::new(parent)?;
        self.write_to(staging.path())?;
        if folder.is_dir() {
            fs::remove_dir_all(folder).map_err(Error::io(folder))?; // hidden files of the system
        }
        staging.publish(folder)
    }

    fn write_to(&self, folder: &Path) -> Result<()> {
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            fs::write(&path, text).map_err(Error::io(path))
        };
        let json = |value: &Value| serde_json::to_string_pretty(value).unwrap_or_default();
        write(SUITE, json(&json!(self.about)) + "\n")?;
        let mut manifest = String::new();
        for entry in &self.entries {
            let line = copy_pictures(entry, folder)?;
            manifest += &Value::Object(line).to_string();
            manifest.push('\n');
        }
        write(MANIFEST, manifest)
    }
}

/// Copies the pictures of an analogy unchanged, and returns its line of the manifest.
fn copy_pictures(entry: &Entry, folder: &Path) -> Result<Map<String, Value>> {
    let pictures = format!("pictures/{}", entry.name);
    let made = folder.join(&pictures);
    fs::create_dir_all(&made).map_err(Error::io(made))?;
    let mut line = Map::new();
    line.insert("name".to_owned(), json!(entry.name));
    line.insert("kind".to_owned(), json!(entry.kind));
    for (name, path) in entry.named_pictures() {
        let mut file = format!("{pictures}/{name}");
        if let Some(extension) = path.extension() {
            file = format!("{file}.{}", extension.to_string_lossy().to_lowercase());
        }
        let copy = folder.join(&file);
        fs::copy(path, &copy).map_err(Error::io(path))?;
        line.insert(name.to_owned(), json!(file));
    }
    let further = [
        ("captions", json!(entry.captions)),
        ("instruction", json!(entry.instruction)),
        ("attributes", json!(entry.attributes)),
    ];
    let told = further.into_iter().filter(|(_, value)| !value.is_null());
    line.extend(told.map(|(name, value)| (name.to_owned(), value)));
    Ok(line)
}
