// SPDX-License-Identifier: Apache-2.0

package app

import (
	"os"
	"strings"
	"testing"
)

// TestOwnPlugins: a program's own plugins are known at a reload as at the start, and to nobody else.
func TestOwnPlugins(t *testing.T) {
	s := newStack(t, stackOptions{noEnvoy: true, spy: func() {}})
	text, err := os.ReadFile(s.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.app.reload(text); err != nil {
		t.Error(err)
	}
	if _, _, err := Check(s.config); err == nil || !strings.Contains(err.Error(), "spy") {
		t.Errorf("Check knows a plugin that is not Baton's: %v", err)
	}
}
