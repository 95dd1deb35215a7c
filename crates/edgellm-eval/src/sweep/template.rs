//! The file that describes a sweep.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use edgellm_model::io::read_text;
use serde::Deserialize;

/// Version of the file format; another one is refused.
const VERSION: u32 = 1;

/// Options of a command, by their long names without dashes. `true` is a flag; a list is joined by commas.
pub(super) type Options = BTreeMap<String, toml::Value>;

/// A template, its variables replaced.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    version: u32,
    /// The sweep's name.
    pub name: String,
    /// Values for `${name}` anywhere in the file.
    #[serde(default, rename = "variables")]
    _variables: BTreeMap<String, String>,
    /// Seeds of everything that draws; the option that takes them is named by `seed_option` of a stage.
    #[serde(default = "one_seed")]
    pub(super) seeds: Vec<u64>,
    pub(super) model: Vec<Model>,
    #[serde(default)]
    pub(super) measure: Options,
    #[serde(default)]
    pub(super) compress: Options,
    pub(super) policy: Vec<Policy>,
    #[serde(default)]
    pub(super) adapter: Vec<Adapter>,
    #[serde(default)]
    pub(super) device: Vec<Device>,
    pub(super) task: Vec<Task>,
    /// Where relative paths begin.
    #[serde(skip)]
    pub(super) folder: PathBuf,
}

fn one_seed() -> Vec<u64> {
    vec![0]
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Model {
    pub(super) name: String,
    /// A folder, a GGUF file, or a stored name.
    pub(super) path: String,
}

/// How a model is compressed: not at all, into one format, or by a solver within each budget.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Policy {
    pub(super) name: String,
    pub(super) format: Option<String>,
    pub(super) solver: Option<String>,
    /// Bits per weight such as "3.5", sizes such as "45MB", or "4.2ms".
    #[serde(default)]
    pub(super) budgets: Vec<String>,
    /// Further options of `plan` or `search`.
    #[serde(default)]
    pub(super) plan: Options,
    /// Further options of `compress`, which override the template's.
    #[serde(default)]
    pub(super) compress: Options,
}

/// An adapter that is tuned on each model; without `adapt`, none.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Adapter {
    pub(super) name: String,
    pub(super) adapt: Option<Options>,
}

/// Where tasks run: options of `eval` and `bench`, such as `threads` or `max-memory`. Models are compressed and adapters
/// tuned once for all devices.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Device {
    pub(super) name: String,
    #[serde(default)]
    pub(super) options: Options,
}

/// What is measured: options of `eval`, or, with `bench`, of `bench`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Task {
    pub(super) name: String,
    pub(super) eval: Option<Options>,
    pub(super) bench: Option<Options>,
    /// Whether the uncompressed model is the base that it is compared with.
    #[serde(default)]
    pub(super) base: bool,
    /// Whether it needs an adapter.
    #[serde(default)]
    pub(super) needs_adapter: bool,
}

/// A template that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct TemplateError {
    path: String,
    reason: String,
}

impl Template {
    /// Reads a template; `set` gives or replaces variables.
    ///
    /// # Errors
    /// The file cannot be read, is no template of this version, names a variable that has no value, or has nothing to run.
    pub fn read(path: &Path, set: &[(String, String)]) -> Result<Self, TemplateError> {
        let text = read_text(path).map_err(|e| TemplateError::new(path, e.to_string()))?;
        let mut template = Self::parse(&text, set).map_err(|reason| TemplateError::new(path, reason))?;
        template.folder = path.parent().map(Path::to_path_buf).unwrap_or_default();
        Ok(template)
    }

    fn parse(text: &str, set: &[(String, String)]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Variables {
            version: Option<u32>,
            #[serde(default)]
            variables: BTreeMap<String, String>,
        }
        // Text with variables in it is still TOML: they stand inside strings.
        let Variables { version, mut variables } = toml::from_str(text).map_err(|e| e.to_string())?;
        if version != Some(VERSION) {
            let found = version.map_or("none".to_owned(), |version| version.to_string());
            return Err(format!("version: expected {VERSION}, found {found}"));
        }
        for (name, value) in set {
            if !variables.contains_key(name) {
                let known: Vec<&str> = variables.keys().map(String::as_str).collect();
                return Err(format!("--set {name}: expected one of the variables {}", known.join(", ")));
            }
            variables.insert(name.clone(), value.clone());
        }
        let text = replaced(text, &variables)?;
        let template: Self = toml::from_str(&text).map_err(|e| e.to_string())?;
        template.check()?;
        Ok(template)
    }

    fn check(&self) -> Result<(), String> {
        debug_assert_eq!(self.version, VERSION);
        for (what, empty) in [
            ("model", self.model.is_empty()),
            ("policy", self.policy.is_empty()),
            ("task", self.task.is_empty()),
            ("seeds", self.seeds.is_empty()),
        ] {
            if empty {
                return Err(format!("{what}: expected at least one, found none"));
            }
        }
        unique("model", self.model.iter().map(|m| &m.name))?;
        unique("policy", self.policy.iter().map(|p| &p.name))?;
        unique("adapter", self.adapter.iter().map(|a| &a.name))?;
        unique("device", self.device.iter().map(|d| &d.name))?;
        unique("task", self.task.iter().map(|t| &t.name))?;
        for policy in &self.policy {
            let name = &policy.name;
            if policy.format.is_some() && policy.solver.is_some() {
                return Err(format!("policy {name}: expected 'format' or 'solver', found both"));
            }
            if policy.solver.is_some() == policy.budgets.is_empty() {
                return Err(format!("policy {name}: 'solver' and 'budgets' go together"));
            }
        }
        for task in &self.task {
            if task.eval.is_some() == task.bench.is_some() {
                return Err(format!("task {}: expected either 'eval' or 'bench'", task.name));
            }
        }
        Ok(())
    }
}

impl TemplateError {
    fn new(path: &Path, reason: String) -> Self {
        Self { path: path.display().to_string(), reason }
    }
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Result<(), String> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(format!("{what} {name}: expected each name once"));
        }
    }
    Ok(())
}

/// `text` with every `${name}` replaced.
fn replaced(text: &str, variables: &BTreeMap<String, String>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let Some(end) = rest[start..].find('}') else { return Err("expected '}' after '${'".into()) };
        let name = &rest[start + 2..start + end];
        let value = variables.get(name).ok_or_else(|| format!("variable {name}: expected a value, found none"))?;
        if value.is_empty() {
            return Err(format!("variable {name}: expected a value; give it with --set {name}=VALUE"));
        }
        out.push_str(&rest[..start]);
        // Inside a string of TOML, which may be a basic one.
        out.push_str(&value.replace('\\', "\\\\").replace('"', "\\\""));
        rest = &rest[start + end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
version = 1
name = "x"
[variables]
model = "tiny"
data = ""
[[model]]
name = "a"
path = "${model}"
[[policy]]
name = "dense"
[[task]]
name = "t"
eval = { text = "t.txt" }
"#;

    #[test]
    fn variables_are_replaced() {
        let set = |name: &str, value: &str| vec![(name.to_owned(), value.to_owned())];
        assert_eq!(Template::parse(TEXT, &[]).unwrap().model[0].path, "tiny");
        assert_eq!(Template::parse(TEXT, &set("model", "a\"b")).unwrap().model[0].path, "a\"b");
        let unknown = Template::parse(TEXT, &set("modell", "x")).unwrap_err();
        assert!(unknown.contains("one of the variables data, model"), "{unknown}");
        let missing = Template::parse(&TEXT.replace("t.txt", "${data}"), &[]).unwrap_err();
        assert!(missing.contains("--set data="), "{missing}");
    }

    #[test]
    fn templates_that_mean_nothing_are_refused() {
        for (from, to, word) in [
            ("version = 1", "version = 2", "version: expected 1, found 2"),
            ("name = \"dense\"", "name = \"dense\"\nsolver = \"solve\"", "'budgets'"),
            ("name = \"dense\"", "name = \"dense\"\nbudget = \"3\"", "budget"),
            ("eval = { text = \"t.txt\" }", "", "either 'eval' or 'bench'"),
            ("[[task]]", "[[task]]\nname = \"t\"\neval = {}\n[[task]]", "each name once"),
        ] {
            let text = TEXT.replace(from, to);
            let error = Template::parse(&text, &[]).unwrap_err();
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}
