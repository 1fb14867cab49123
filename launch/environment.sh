# shellcheck shell=bash
# What the launch scripts share; sourced, never run.

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints a port nobody uses. The kernel picks it, from the range that it keeps for such.
FREE_PORT_CODE='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'

free_port() {
  python -c "$FREE_PORT_CODE" || fail "there is no working 'python' on the PATH; activate the environment of recap_ds"
}

# The files whose NAME=value lines every rank gets, as DeepSpeed finds them: in the home folder, then in this one.
environment_files() {
  local name=${DS_ENV_FILE:-.deepspeed_env} file
  if [[ $name == /* ]]; then
    [[ ! -f $name ]] || printf '%s\n' "$name"
    return
  fi
  for file in "$HOME/$name" "./$name"; do
    [[ ! -f $file ]] || printf '%s\n' "$file"
  done
}

# DeepSpeed's launcher dies of a blank line or a comment in such a file; pdsh and the shell over there change the rest.
check_environment_files() {
  local file line number
  [[ -z ${DS_ENV_FILE:-} || -n $(environment_files) ]] || fail "DS_ENV_FILE: there is no file '$DS_ENV_FILE'"
  while IFS= read -r file; do
    number=0
    while IFS= read -r line || [[ -n $line ]]; do
      number=$((number + 1))
      [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*=[^\'\"\$\`\\%]*$ && $line != *$'\r'* ]] ||
        fail "$file, line $number: $(printf %q "$line") is not NAME=value;" \
          "no blank lines, comments, quotes, Windows line ends, %, \$, \` or \\"
    done <"$file"
  done < <(environment_files)
}

# For launchers that do not read those files: their lines become variables here.
export_environment_files() {
  local file line
  check_environment_files
  while IFS= read -r file; do
    while IFS= read -r line || [[ -n $line ]]; do
      export "${line?}"
    done <"$file"
  done < <(environment_files)
}
