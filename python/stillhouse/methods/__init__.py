"""Published distillation methods, one file each; `stillhouse.methods.catalog` lists them."""
