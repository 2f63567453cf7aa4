//! Compiles RocksDB in groups of source files ("unity build"), where `.cargo/config.toml` has told `librocksdb-sys` not to.
//!
//! RocksDB's own continuous integration compiles all of its sources as one file (`make unity.a`), so their names do not collide.
//! Groups instead of one file keep every core busy and the compiler's memory small.
//!
//! Where `ROCKSDB_LIB_DIR` does not name this crate, `librocksdb-sys` has compiled RocksDB or found it elsewhere, and there is
//! nothing to do.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// What `.cargo/config.toml` sets `ROCKSDB_LIB_DIR` to.
const BUILT_HERE: &str = "built-by-kvstore-rocksdb";

/// Bytes of source in a group, at most, unless a single file is larger. A compiler needs up to 1.2 GiB for one; there are some
/// twenty groups, enough for as many cores.
const GROUP_BYTES_MAX: u64 = 400 << 10;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/arc4random.cc");
    for name in ["ROCKSDB_LIB_DIR", "ROCKSDB_COMPILE", "ROCKSDB_STATIC"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    // `librocksdb-sys` has compiled RocksDB itself.
    let compiled = env::var("ROCKSDB_COMPILE").is_ok_and(|asked| asked == "1" || asked.eq_ignore_ascii_case("true"));
    if compiled || env::var("ROCKSDB_LIB_DIR").as_deref() != Ok(BUILT_HERE) {
        return;
    }
    assert!(
        env::var_os("ROCKSDB_STATIC").is_none(),
        "ROCKSDB_STATIC needs a library: set ROCKSDB_LIB_DIR to its folder, too, or unset ROCKSDB_STATIC"
    );
    let package = PathBuf::from(variable("DEP_ROCKSDB_CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(variable("OUT_DIR"));
    let mut compiler = compiler(&package);
    for (number, group) in groups(&package).iter().enumerate() {
        compiler.file(write_group(&out, number, group));
    }
    compiler.compile("rocksdb");
    rerun_with_another_compiler();
    link_standard_library_statically(&compiler, &out);
    // `librocksdb-sys` asks the linker for `-lrocksdb` and `-lstdc++`; this is where it looks first.
    println!("cargo::rustc-link-search=native={}", out.display());
}

/// What the `cc` crate reads from the environment; it tells cargo so only together with links that are not wanted here.
fn rerun_with_another_compiler() {
    let target = variable("TARGET");
    for name in ["CXX", "CXXFLAGS", "AR", "ARFLAGS", "CXXSTDLIB"] {
        for suffix in [String::new(), format!("_{target}"), format!("_{}", target.replace('-', "_"))] {
            println!("cargo::rerun-if-env-changed={name}{suffix}");
        }
        println!("cargo::rerun-if-env-changed=TARGET_{name}");
        println!("cargo::rerun-if-env-changed=HOST_{name}");
    }
}

/// Cargo sets these for every build script.
fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run this build script through cargo"))
}

/// The sources in RocksDB's own order, in groups.
fn groups(package: &Path) -> Vec<Vec<PathBuf>> {
    let list = package.join("rocksdb_lib_sources.txt");
    let names = fs::read_to_string(&list).unwrap_or_else(|error| panic!("{}: {error}", list.display()));
    // The package has its version in a file that was generated when it was made, outside RocksDB's own tree.
    let sources = names.lines().map(str::trim).filter(|name| !name.is_empty() && *name != "util/build_version.cc");
    let sources = sources.map(|name| package.join("rocksdb").join(name));
    let ours = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("src/arc4random.cc");
    // In the first group, which every program needs: a linker that reads archives in order then finds it.
    let sources = [ours].into_iter().chain(sources).chain([package.join("build_version.cc")]);
    let mut groups: Vec<Vec<PathBuf>> = Vec::new();
    let mut left = 0;
    for source in sources {
        let bytes = fs::metadata(&source).unwrap_or_else(|error| panic!("{}: {error}", source.display())).len();
        if groups.is_empty() || bytes > left {
            groups.push(Vec::new());
            left = GROUP_BYTES_MAX;
        }
        left = left.saturating_sub(bytes);
        groups.last_mut().expect("one was just made").push(source);
    }
    groups
}

/// Writes a file that includes the sources of a group. Returns its path.
fn write_group(out: &Path, number: usize, group: &[PathBuf]) -> PathBuf {
    let path = out.join(format!("group_{number:02}.cc"));
    let text: String = group.iter().map(|source| format!("#include \"{}\"\n", source.display())).collect();
    fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}

/// Puts the static C++ standard library where the linker looks first: programs then run where no libstdc++ is installed, or an
/// older one. Without it they are linked with the shared one.
fn link_standard_library_statically(compiler: &cc::Build, out: &Path) {
    const LIBRARY: &str = "libstdc++.a";
    let compiler = compiler.get_compiler();
    let asked = compiler.to_command().arg(format!("-print-file-name={LIBRARY}")).output();
    let Ok(asked) = asked else { return };
    // A compiler that does not have it answers with the bare name.
    let found = PathBuf::from(String::from_utf8_lossy(&asked.stdout).trim().to_owned());
    if found.is_absolute() {
        fs::copy(&found, out.join(LIBRARY)).unwrap_or_else(|error| panic!("{}: {error}", found.display()));
    }
}

/// The compiler, as RocksDB's own build sets it up on Linux.
fn compiler(package: &Path) -> cc::Build {
    let mut compiler = cc::Build::new();
    compiler.cpp(true).std("c++20").warnings(false).cargo_metadata(false);
    compiler.include(package.join("rocksdb/include")).include(package.join("rocksdb")).include(package);
    for define in [
        "NDEBUG",
        "HAVE_ALIGNED_NEW",
        "HAVE_UINT128_EXTENSION",
        "OS_LINUX",
        "ROCKSDB_PLATFORM_POSIX",
        "ROCKSDB_LIB_IO_POSIX",
        "ROCKSDB_SCHED_GETCPU_PRESENT",
        "ROCKSDB_AUXV_GETAUXVAL_PRESENT",
        "ROCKSDB_FALLOCATE_PRESENT",
        "ROCKSDB_RANGESYNC_PRESENT",
    ] {
        compiler.define(define, None);
    }
    // Two of its headers use fixed-width integers without their header.
    compiler.flag("-include").flag("cstdint");
    // The processor and its instructions that the Rust code may use.
    let arm = env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|name| name == "aarch64");
    let processor = target_cpu();
    if let Some(processor) = &processor {
        compiler.flag_if_supported(format!("{}={processor}", if arm { "-mcpu" } else { "-march" }));
    }
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    for (feature, flag) in [
        ("sse4.1", "-msse4.1"),
        ("sse4.2", "-msse4.2"),
        ("avx2", "-mavx2"),
        ("bmi1", "-mbmi"),
        ("lzcnt", "-mlzcnt"),
        ("pclmulqdq", "-mpclmul"),
    ] {
        if features.split(',').any(|has| has == feature) {
            compiler.flag_if_supported(flag);
        }
    }
    if arm
        && processor.is_none()
        && features.split(',').any(|has| has == "crc")
        && features.split(',').any(|has| has == "aes")
    {
        compiler.flag_if_supported("-march=armv8-a+crc+aes+crypto");
    }
    compiler
}

/// The processor that `RUSTFLAGS` names with `-C target-cpu`.
fn target_cpu() -> Option<String> {
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").ok()?;
    let named = flags.split('\x1f').filter_map(|flag| flag.trim_start_matches("-C").strip_prefix("target-cpu="));
    named.last().map(str::to_owned)
}
