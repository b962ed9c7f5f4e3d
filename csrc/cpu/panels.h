// Queries as a product engine takes them, and their similarities to their positives.
#pragma once

#include <functional>
#include <vector>

#include "product.h"

namespace contrastive_ops {

// The rows of a matrix as numbers, normalised if asked for, and as operands by panels. Panels that are not
// full are padded with zero rows.
template <typename Product>
class Panels {
  using T = typename Product::Sum;
  using Operand = typename Product::Operand;

 public:
  // `for_keys`: also as accumulate_keys takes them.
  Panels(const Matrix& rows, bool normalized, bool for_keys = false)
      : Panels(rows.rows, at::divup(rows.rows, kPanel<T>), rows.columns, normalized, for_keys,
               [&rows](int64_t panel) {
                 return rows.slice(panel * kPanel<T>, std::min((panel + 1) * kPanel<T>, rows.rows));
               }) {}

  // `rows_of` gives the rows of a panel, at most kPanel.
  template <typename RowsOf>
  Panels(int64_t count, int64_t panels, int64_t dim, bool normalized, bool for_keys, const RowsOf& rows_of)
      : count(count),
        dim(dim),
        panels(panels),
        norm(panels * kPanel<T>, 1),
        operand_(Product::packed_elements(dim)),
        unit_(panels * kPanel<T> * dim),
        packed_(panels * operand_),
        packed_rows_(for_keys ? panels * Product::packed_rows_elements(dim) : 0) {
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const Matrix rows = rows_of(panel);
        const int64_t first = panel * kPanel<T>;
        T* unit = &unit_[first * dim];
        copy(rows, unit, dim, 1);
        for (int64_t row = 0; normalized && row < rows.rows; ++row)
          norm[first + row] = contrastive_ops::normalize(unit + row * dim, dim);
        Product::pack(unit, dim, &packed_[panel * operand_]);
        if (for_keys)
          Product::pack_rows(unit, dim, &packed_rows_[panel * Product::packed_rows_elements(dim)]);
      }
    });
  }

  const T* unit(int64_t row) const { return &unit_[row * dim]; }
  const Operand* packed(int64_t panel) const { return &packed_[panel * operand_]; }
  const Operand* packed_rows(int64_t panel) const {
    return &packed_rows_[panel * Product::packed_rows_elements(dim)];
  }

  const int64_t count, dim, panels;  // count: of rows, without the padding
  std::vector<double> norm;

 private:
  const int64_t operand_;
  Array<T> unit_;
  Array<Operand> packed_, packed_rows_;
};

// What each query row has in common with the key that is its positive: the one of its lane, in the panel of
// keys that `panel_of` gives for its own.
template <typename T>
struct Positives {
  std::vector<double> similarity;  // s_+
  Array<T> threshold;              // the same from the product that gives every s_j, so that equal keys tie

  // In double: this error would be divided by tau, and no sum over keys averages it.
  template <typename Product, typename PanelOf = std::identity>
  Positives(const Panels<Product>& queries, const Panels<Product>& keys, const PanelOf& panel_of = {})
      : similarity(queries.panels * kPanel<T>), threshold(similarity.size()) {
    static_assert(kPanel<T> <= Product::kTile);
    const int64_t dim = queries.dim;
    at::parallel_for(0, queries.panels, 1, [&](int64_t begin, int64_t end) {
      Array<T> similarities(kPanel<T> * kPanel<T>);
      Product product(dim);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kPanel<T>, first_key = panel_of(panel) * kPanel<T>;
        product.load(Matrix(keys.unit(first_key), kPanel<T>, dim));
        product.similarities(queries.packed(panel), similarities.data());
        for (int64_t lane = 0; lane < kPanel<T>; ++lane) {
          const T *q = queries.unit(first + lane), *k = keys.unit(first_key + lane);
          similarity[first + lane] = dot(q, k, dim);
          threshold[first + lane] = similarities[lane * kPanel<T> + lane];
        }
      }
    });
  }
};

}  // namespace contrastive_ops
