// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"testing"
)

// FuzzLoad checks that no file panics, and that the resolved form of one that loads loads again as itself.
func FuzzLoad(f *testing.F) {
	for _, pattern := range []string{"good-*.yaml", "bad-*.yaml"} {
		for _, data := range files(f, pattern) {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Load("f", data)
		if err != nil {
			return
		}
		once, err := c.Resolved()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Load("resolved", once)
		if err != nil {
			t.Fatalf("the resolved form does not load: %v\n%s", err, once)
		}
		twice, err := again.Resolved()
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("resolved twice: %v\n%s\n%s", err, once, twice)
		}
	})
}
