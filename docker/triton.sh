#!/bin/sh
# Makes FOLDER/cc, which answers the one call that Triton makes of a C compiler on NVIDIA GPUs, for
# its driver.c, with a library compiled now. So the image needs no compiler.
#   sh triton.sh FOLDER PYTHON    # needs gcc, Python's headers, and Triton in PYTHON's environment
set -eu
folder=$1
python=$2
triton=$("$python" -c 'import importlib.util as u; print(*u.find_spec("triton").submodule_search_locations)')
nvidia=$triton/backends/nvidia
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')
mkdir -p "$folder"
cp "$nvidia/driver.c" "$folder/driver.c"
# The driver's own library comes with the host's driver; its name is all that a linker needs.
echo | gcc -x c - -shared -Wl,-soname,libcuda.so.1 -o "$folder/libcuda.so.1"
gcc "$folder/driver.c" -O3 -shared -fPIC -Wno-psabi -Wl,--no-as-needed -o "$folder/cuda_utils.so" \
  -L"$folder" -l:libcuda.so.1 -I"$nvidia/include" -I"$headers"
rm "$folder/libcuda.so.1"
cat > "$folder/cc" <<'END'
#!/bin/sh
# Stands for a C compiler (see docker/triton.sh). Triton calls: cc SOURCE OPTIONS... -o LIBRARY ...
here=$(dirname "$0")
source=$1
while [ $# -gt 1 ] && [ "$1" != -o ]; do shift; done
if [ $# -gt 1 ] && cmp -s "$source" "$here/driver.c"; then
  exec cp "$here/cuda_utils.so" "$2"
fi
echo "this image has no C compiler: $source cannot be compiled; build an image with gcc on top of" \
  "it and set CC=gcc" >&2
exit 1
END
chmod 755 "$folder/cc"
