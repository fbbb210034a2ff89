//! Reopening: nodes get other options, all of those asked for or none.
//!
//! 1. Plan: the nodes named, and below them those that a parent opened for itself, which follow its cache mode
//!    and writability. Parents come before their children.
//! 2. Drain everything that reaches them; flush what will be read-only.
//! 3. Every driver prepares.
//! 4. Permissions are worked out as they will be, and protocols take or release their locks.
//! 5. Every driver commits, children first, so that a parent that has something to write finds its file writable.
//!
//! A failure up to and including step 4 undoes the steps before; step 5 cannot fail.

use std::sync::Arc;

use serde_json::Value;

use super::generic::take_generic;
use super::{Drained, Graph, OpenFlags};
use crate::driver::DriverKind;
use crate::node::Settings;
use crate::perm::Perm;
use crate::{ChildIdx, Error, ErrorKind, Node, Options, Result, request};

/// One node to reopen.
pub struct ReopenRequest {
    /// The node.
    pub node: Arc<Node>,
    /// Its new options, generic ones included.
    pub options: Options,
    /// What is not mentioned stays as it is; otherwise it goes back to its default.
    pub keep: bool,
}

struct Planned {
    node: Arc<Node>,
    settings: Settings,
}

impl Graph {
    /// Reopens several nodes: all of them, or none.
    ///
    /// # Errors
    /// When an option cannot change, a driver refuses, or a user of a node is in the way of what it
    /// becomes.
    pub async fn reopen(&self, requests: Vec<ReopenRequest>) -> Result<()> {
        let mut plan = Vec::new();
        for request in requests {
            let base = if request.keep { request.node.flags() } else { defaults(&request.node) };
            plan_node(&mut plan, &request.node, &request.options, &base, request.keep)?;
        }
        let _drained = self.drain_all(&plan).await;
        for planned in &plan {
            if planned.settings.flags.read_only && !planned.node.is_read_only() {
                let flushed = request::flush(&planned.node).await;
                flushed.map_err(|error| error.prefix("Error flushing drive"))?;
            }
        }
        for (at, planned) in plan.iter().enumerate() {
            if let Err(error) = prepare(planned).await {
                abort(plan.get(..at).unwrap_or_default()).await;
                return Err(error);
            }
        }
        if let Err(error) = change_permissions(&plan) {
            abort(&plan).await;
            return Err(error);
        }
        for planned in plan.into_iter().rev() {
            if let Some(driver) = planned.node.driver().reopen() {
                driver.commit().await;
            }
            planned.node.apply(planned.settings);
        }
        Ok(())
    }

    async fn drain_all(&self, plan: &[Planned]) -> Vec<Drained> {
        let mut drained = Vec::new();
        for planned in plan {
            drained.push(self.drain(&planned.node).await);
        }
        drained
    }
}

/// The flags of a node of which nothing is said but how it came to be.
fn defaults(node: &Node) -> OpenFlags {
    let now = node.flags();
    OpenFlags {
        no_backing: now.no_backing,
        check: now.check,
        probed: now.probed,
        no_io: now.no_io,
        ..OpenFlags::default()
    }
}

fn plan_node(
    plan: &mut Vec<Planned>,
    node: &Arc<Node>,
    options: &Options,
    base: &OpenFlags,
    keep: bool,
) -> Result<()> {
    let is_planned = |node: &Arc<Node>| plan.iter().any(|other| Arc::ptr_eq(&other.node, node));
    if is_planned(node) {
        return Err(Error::invalid(format!("Node '{}' is to be reopened twice", node.name())));
    }
    let now = node.settings();
    let mut all = Options::new();
    if keep {
        all.overlay(&now.given);
        all.overlay(&now.options);
    }
    all.overlay(options);
    let children: Vec<_> = ChildIdx::all().map(|child| (child, all.take(child.name()))).collect();
    let generic = take_generic(&mut all, base)?;
    must_be(generic.driver, node.factory().name(), "driver")?;
    must_be(generic.node_name, node.name(), "node-name")?;
    let mut flags = generic.flags;
    flags.probed = now.flags.probed;
    let settings = Settings {
        flags,
        detect_zeroes: generic.detect_zeroes,
        options: all,
        given: generic.given,
    };
    let flags = settings.flags.clone();
    plan.push(Planned { node: Arc::clone(node), settings });
    for (child, option) in children {
        plan_child(plan, node, child, option, &flags, keep)?;
    }
    Ok(())
}

fn plan_child(
    plan: &mut Vec<Planned>,
    parent: &Node,
    child: ChildIdx,
    option: Option<Value>,
    parent_flags: &OpenFlags,
    keep: bool,
) -> Result<()> {
    let Some(node) = parent.child(child) else {
        return match option {
            None | Some(Value::Null) => Ok(()),
            Some(_) => Err(cannot_replace(child)),
        };
    };
    let inherited = inherit(&node.flags(), child, parent_flags);
    match option {
        Some(Value::String(name)) if name == node.name() => Ok(()),
        Some(Value::Object(map)) => {
            plan_node(plan, &node, &Options::from_map(map)?, &inherited, keep)
        }
        Some(_) => Err(cannot_replace(child)),
        None if node.follows_parent() && inherited != node.flags() => {
            plan_node(plan, &node, &Options::new(), &inherited, true)
        }
        None => Ok(()),
    }
}

fn cannot_replace(child: ChildIdx) -> Error {
    Error::unsupported(format!(
        "Replacing the '{}' child by a reopen is not supported",
        child.name()
    ))
}

/// The flags of a child that its parent opened for itself.
fn inherit(child_flags: &OpenFlags, child: ChildIdx, parent: &OpenFlags) -> OpenFlags {
    let mut flags = child_flags.clone();
    flags.direct = parent.direct;
    flags.no_flush = parent.no_flush;
    flags.force_share = parent.force_share;
    if child != ChildIdx::BACKING {
        flags.read_only = parent.read_only;
        flags.auto_read_only = parent.auto_read_only;
    }
    flags
}

fn must_be(given: Option<String>, is: &str, option: &str) -> Result<()> {
    match given {
        Some(other) if other != is => {
            Err(Error::invalid(format!("Cannot change the option '{option}'")))
        }
        _ => Ok(()),
    }
}

async fn prepare(planned: &Planned) -> Result<()> {
    let node = &planned.node;
    let Some(driver) = node.driver().reopen() else {
        let what = match node.factory().kind() {
            DriverKind::Protocol => "protocol",
            _ => "format",
        };
        return Err(Error::unsupported(format!(
            "Block {what} '{}' used by node '{}' does not support reopening files",
            node.factory().name(),
            node.name()
        )));
    };
    let settings = &planned.settings;
    let prepared = driver.prepare(settings.flags.clone(), &settings.options).await;
    prepared.map_err(|error| error.on_node(node.name()))
}

async fn abort(plan: &[Planned]) {
    for planned in plan.iter().rev() {
        if let Some(driver) = planned.node.driver().reopen() {
            driver.abort().await;
        }
    }
}

/// Works the permissions out as if the nodes had their new settings; on failure as they were.
fn change_permissions(plan: &[Planned]) -> Result<()> {
    let before: Vec<bool> = plan.iter().map(|planned| planned.node.is_read_only()).collect();
    for planned in plan {
        planned.node.set_read_only(planned.settings.flags.read_only);
    }
    let outcome = plan.iter().try_for_each(|planned| {
        planned.node.refresh_permissions()?;
        check_writers(&planned.node)
    });
    if outcome.is_err() {
        for (planned, read_only) in plan.iter().zip(before) {
            planned.node.set_read_only(read_only);
        }
        for planned in plan {
            // What was held before can be held again.
            let _ = planned.node.refresh_permissions();
        }
    }
    outcome
}

fn check_writers(node: &Node) -> Result<()> {
    if !node.is_read_only() || !node.cumulative().taken.contains(Perm::WRITE) {
        return Ok(());
    }
    let text = format!("Read-only block node '{}' cannot support read-write users", node.name());
    Err(Error::new(ErrorKind::Denied, text).on_node(node.name()))
}
