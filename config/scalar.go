// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"math"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// quantitySuffixes are those of Kubernetes quantities that make whole numbers larger, longest first.
var quantitySuffixes = [...]struct {
	text string
	unit float64
}{
	{"Ki", 1 << 10},
	{"Mi", 1 << 20},
	{"Gi", 1 << 30},
	{"Ti", 1 << 40},
	{"Pi", 1 << 50},
	{"Ei", 1 << 60},
	{"k", 1e3},
	{"M", 1e6},
	{"G", 1e9},
	{"T", 1e12},
	{"P", 1e15},
	{"E", 1e18},
}

// parseQuantity reads a Kubernetes quantity that is a whole number of 0 or more: 1048576, 1Mi, 1.5Gi, 5k, 1e3.
func parseQuantity(s string) (int64, bool) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return max(n, 0), n >= 0
	}
	unit := 1.0
	for _, suffix := range quantitySuffixes {
		if head, ok := strings.CutSuffix(s, suffix.text); ok {
			s, unit = head, suffix.unit
			break
		}
	}
	f, err := strconv.ParseFloat(s, 64)
	f *= unit
	if err != nil || math.IsNaN(f) || f < 0 || f >= math.MaxInt64 || f != math.Trunc(f) {
		return 0, false
	}
	return int64(f), true
}

// formatQuantity is the shortest exact text with a binary suffix.
func formatQuantity(n int64) any {
	for _, suffix := range [...]string{"Gi", "Mi", "Ki"} {
		unit := int64(1) << (10 * (1 + strings.IndexByte("KMG", suffix[0])))
		if n > 0 && n%unit == 0 {
			return strconv.FormatInt(n/unit, 10) + suffix
		}
	}
	return n
}

// formatDuration is Duration.String without the parts that are zero: 2m, not 2m0s.
func formatDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// wanted names what a Go type accepts.
func wanted(t reflect.Type, opts string) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "a duration with a unit, such as 500ms or 2m"
	case strings.Contains(opts, "quantity"):
		return "a quantity such as 64Mi"
	}
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "a whole number of 0 or more"
	default:
		return "a whole number"
	}
}

// describe names what a node is, for error texts.
func describe(n *node) string {
	if n.kind == kindScalar {
		return show(n.value)
	}
	return n.kind.String()
}

// show prints a scalar for error texts, shortened.
func show(value any) string {
	s, ok := value.(string)
	if !ok {
		return fmt.Sprint(value)
	}
	if len(s) > 64 {
		s = s[:64] + "…"
	}
	return strconv.Quote(s)
}

// plain turns a tree into map[string]any, []any and scalars.
func plain(n *node) any {
	switch n.kind {
	case kindList:
		out := make([]any, len(n.items))
		for i, item := range n.items {
			out[i] = plain(item)
		}
		return out
	case kindMapping:
		out := make(map[string]any, len(n.keys))
		for i, k := range n.keys {
			out[k.name] = plain(n.items[i])
		}
		return out
	default:
		return n.value
	}
}
