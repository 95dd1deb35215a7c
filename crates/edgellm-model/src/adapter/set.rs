//! Several adapters on one base, by name: loaded once, chosen at run time.
//!
//! The base's weights are shared and never changed, so choosing another adapter moves a pointer. What was computed with
//! one adapter does not hold for another: keys and values in a cache belong to the adapter that they were computed with.
//! A [`Generator`](crate::generate::Generator) borrows its adapter for as long as its cache lives, and
//! [`choose`](AdapterSet::choose) needs the set for itself, so the two cannot be mixed; a conversation that goes on with
//! another adapter starts a new generator and runs its tokens again.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;

use super::Adapter;
use crate::ModelError;
use crate::config::ModelConfig;

/// The longest name of an adapter, in bytes.
const LONGEST_NAME: usize = 64;

/// Named adapters of one base, and which of them is in use.
#[derive(Clone, Debug, Default)]
pub struct AdapterSet {
    adapters: BTreeMap<String, Adapter>,
    /// In use where no adapter is chosen: the base's own exit norms, if it has any.
    plain: Option<Adapter>,
    chosen: Option<String>,
}

impl AdapterSet {
    /// A set without adapters. `plain` holds the exit norms that come with the base, if any: they are in use while no
    /// adapter is chosen.
    pub fn new(plain: Option<Adapter>) -> Self {
        Self { plain, ..Self::default() }
    }

    /// Reads the adapter directory `dir` under a name. The first adapter of a set does not become the chosen one.
    ///
    /// # Errors
    /// The name is not one or is taken, or see [`Adapter::load`].
    pub fn load(&mut self, name: &str, dir: &Path, model: &ModelConfig, device: &Device) -> Result<(), ModelError> {
        self.check_name(name)?;
        self.insert(name, Adapter::load(dir, model, device)?)
    }

    /// Adds an adapter under a name. That it fits the base is the caller's to see to ([`Adapter::check_fits`]).
    ///
    /// # Errors
    /// The name is empty, longer than 64 bytes, `none`, has spaces or control characters, or is taken.
    pub fn insert(&mut self, name: &str, adapter: Adapter) -> Result<(), ModelError> {
        self.check_name(name)?;
        self.adapters.insert(name.to_owned(), adapter);
        Ok(())
    }

    /// Takes an adapter out. If it was the chosen one, none is chosen now.
    ///
    /// # Errors
    /// There is no adapter of this name.
    pub fn remove(&mut self, name: &str) -> Result<Adapter, ModelError> {
        let removed = self.adapters.remove(name).ok_or_else(|| self.unknown(name))?;
        if self.chosen.as_deref() == Some(name) {
            self.chosen = None;
        }
        Ok(removed)
    }

    /// Uses the adapter of this name from now on, or none.
    ///
    /// # Errors
    /// There is no adapter of this name; the chosen one is then as it was.
    pub fn choose(&mut self, name: Option<&str>) -> Result<(), ModelError> {
        self.get(name)?;
        self.chosen = name.map(str::to_owned);
        Ok(())
    }

    /// The name of the chosen adapter.
    pub fn chosen(&self) -> Option<&str> {
        self.chosen.as_deref()
    }

    /// What to run the base with: the chosen adapter, or the base's own exit norms.
    pub fn current(&self) -> Option<&Adapter> {
        match &self.chosen {
            Some(name) => self.adapters.get(name),
            None => self.plain.as_ref(),
        }
    }

    /// What to run the base with to use this name: the adapter, or for `None` the base's own exit norms.
    ///
    /// # Errors
    /// There is no adapter of this name.
    pub fn get(&self, name: Option<&str>) -> Result<Option<&Adapter>, ModelError> {
        match name {
            None => Ok(self.plain.as_ref()),
            Some(name) => self.adapters.get(name).map(Some).ok_or_else(|| self.unknown(name)),
        }
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    fn check_name(&self, name: &str) -> Result<(), ModelError> {
        let what = "name of an adapter".to_string();
        let bad = |c: char| c.is_whitespace() || c.is_control();
        if name.is_empty() || name.len() > LONGEST_NAME || name == "none" || name.contains(bad) {
            let expected = format!("1 to {LONGEST_NAME} bytes without spaces, other than 'none'");
            let found = format!("'{}'", name.escape_debug().take(80).collect::<String>());
            return Err(ModelError::Value { what, expected, found });
        }
        if self.adapters.contains_key(name) {
            let expected = "a name that is not taken".to_string();
            return Err(ModelError::Value { what, expected, found: format!("'{name}' for a second time") });
        }
        Ok(())
    }

    fn unknown(&self, name: &str) -> ModelError {
        let names: Vec<&str> = self.names().collect();
        let expected = if names.is_empty() { "none, there is no adapter".into() } else { names.join(", ") };
        let found = format!("'{}'", name.escape_debug().take(80).collect::<String>());
        ModelError::Value { what: "adapter".into(), expected, found }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{LoraConfig, Targets};
    use crate::testing::tiny_config;

    fn adapter(seed: u64) -> Adapter {
        let lora = LoraConfig { rank: 2, alpha: 4.0, use_rslora: false, targets: Targets::all_linear() };
        Adapter::new(&tiny_config(serde_json::json!({})), lora, seed, &Device::flex()).unwrap()
    }

    #[test]
    fn adapters_are_added_chosen_and_removed() {
        let mut set = AdapterSet::default();
        assert!(set.current().is_none() && set.chosen().is_none());
        set.insert("a", adapter(0)).unwrap();
        set.insert("b", adapter(1)).unwrap();
        assert!(set.current().is_none(), "adding is not choosing");
        assert_eq!(set.names().collect::<Vec<_>>(), ["a", "b"]);
        set.choose(Some("b")).unwrap();
        assert_eq!(set.chosen(), Some("b"));
        assert!(std::ptr::eq(set.current().unwrap(), set.get(Some("b")).unwrap().unwrap()));
        assert!(set.choose(Some("c")).unwrap_err().to_string().contains("expected a, b, found 'c'"));
        assert_eq!(set.chosen(), Some("b"));
        set.remove("b").unwrap();
        assert!(set.chosen().is_none() && set.current().is_none());
        assert!(set.remove("b").is_err());
        for bad in ["", "a", "none", "two words", "a\n", &"x".repeat(65)] {
            assert!(set.insert(bad, adapter(2)).is_err(), "{bad:?}");
        }
    }
}
