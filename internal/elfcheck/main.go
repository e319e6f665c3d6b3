// SPDX-License-Identifier: Apache-2.0

// Elfcheck exits with 1 when one of the named files is not a static executable: an image without a C library could not
// start it. Only Linux has such files: elsewhere there is nothing to check.
package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"runtime"
)

var errDynamic = errors.New("asks for a dynamic loader, so it is not a static executable")

func main() {
	if runtime.GOOS != "linux" {
		return
	}
	for _, path := range os.Args[1:] {
		if err := check(path); err != nil {
			fmt.Fprintf(os.Stderr, "elfcheck: %s: %v\n", path, err)
			os.Exit(1)
		}
	}
}

func check(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errDynamic
		}
	}
	return nil
}
