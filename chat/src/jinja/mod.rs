//! Chat templates, as transformers renders them: Jinja's sandbox, with Python's values. What is not done here is an error, never a guess.

pub(crate) mod ast;
mod attrs;
mod bounds;
mod calls;
mod clock;
mod exprs;
mod filters;
mod format;
mod functions;
mod interp;
mod lex;
mod methods;
mod names;
pub(crate) mod object;
mod ops;
mod parse;
mod printable;
mod sequences;
mod sort;
mod tests;
pub(crate) mod text;
mod walk;

pub use clock::Clock;

use crate::caps::SOURCE_BYTES_MAX;
use crate::value::Dict;

/// A template that is none, or one of what is not done here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Syntax(pub String);

/// Why a template gave no text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// It refuses.
    #[error("the template refuses: {0}")]
    Raised(String),
    /// Python would raise.
    #[error("the template fails: {0}")]
    Failed(String),
    /// It uses what is not done here.
    #[error("{0} is not done here")]
    Unsupported(String),
    /// A bound.
    #[error("too many {0}")]
    TooMuch(&'static str),
}

/// In which form a template expects the contents of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentForm {
    /// Lists of parts.
    OpenAi,
    /// Texts.
    String,
}

/// What an engine finds out about a template without running it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The form of contents.
    pub content: ContentForm,
    /// It names the role "developer".
    pub knows_developer: bool,
    /// The word stands in it; without it no last message goes on.
    pub has_word_content: bool,
    /// Its text changes with the time.
    pub asks_time: bool,
    /// What SGLang finds out.
    pub sglang: crate::sglang::Form,
}

/// A template, ready to be rendered.
#[derive(Debug)]
pub struct Template {
    body: Vec<ast::Stmt>,
    facts: Facts,
}

impl Template {
    /// Reads a template.
    pub fn parse(source: &str) -> Result<Self, Syntax> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(Syntax(format!("it has more than {SOURCE_BYTES_MAX} bytes")));
        }
        let mut body = parse::parse(source)?;
        walk::check_names(&body)?;
        let facts = walk::facts(source, &body);
        names::settle(&mut body)?;
        Ok(Self { body, facts })
    }

    /// Its text for these names.
    pub fn render(&self, context: &Dict, clock: &Clock) -> Result<String, RenderError> {
        interp::render(&self.body, context, clock)
    }

    /// What an engine finds out about it.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }
}
