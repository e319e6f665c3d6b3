// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"math"
	"slices"
	"strconv"
)

// pythonFloat writes v as Python's client does: 1.0, 0.25, 1.795314009467145e+09.
func pythonFloat(v float64) string { return string(appendFloat(nil, v)) }

func appendFloat(dst []byte, v float64) []byte {
	switch {
	case v == 0:
		return append(dst, "0.0"...)
	case math.IsNaN(v):
		return append(dst, "NaN"...)
	case math.IsInf(v, 1):
		return append(dst, "+Inf"...)
	case math.IsInf(v, -1):
		return append(dst, "-Inf"...)
	case math.Abs(v) >= 1e6:
		return strconv.AppendFloat(dst, v, 'e', -1, 64)
	case math.Abs(v) < 1e-4:
		return strconv.AppendFloat(dst, v, 'e', -1, 64)
	}
	at := len(dst)
	dst = strconv.AppendFloat(dst, v, 'f', -1, 64)
	if slices.Contains(dst[at:], '.') {
		return dst
	}
	return append(dst, ".0"...)
}
